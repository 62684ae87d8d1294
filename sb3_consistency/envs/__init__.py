"""What Gymnasium's environments and spaces mean here."""
