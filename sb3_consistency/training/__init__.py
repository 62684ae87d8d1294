"""From losses to steps: batches, updates, phases, and SB3's hooks around them."""
