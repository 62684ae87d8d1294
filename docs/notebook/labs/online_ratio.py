"""CPU ms per environment step on Hopper-v5, SB3's SAC and lab arms interleaved in one process (medians of rounds)."""
import time, warnings; warnings.filterwarnings("ignore")
import gymnasium as gym, numpy as np, torch as th
from stable_baselines3 import SAC
import lab
th.set_num_threads(1)
ARMS = ["SAC", "C", "B", "C+ln=2", "C+batch=128", "C+width=128+batch=128", "B+width=128+batch=128", "C+utd=2+delay=2", "C+batch=128+utd=2+delay=2", "C+quantiles=12+drop=1"]
model = SAC("MlpPolicy", "Hopper-v5", device="cpu", seed=0); model.learn(120)
env = gym.make("Hopper-v5"); obs = env.reset(seed=0)[0].astype(np.float32)
made = {}
for a in ARMS:
    cfg = lab.parse(a); made[a] = (lab.Agent(11, 3, cfg), lab.Replay(3000, 11, 3, cfg.n_step, .99), cfg)
    r = made[a][1]; r.rows[:] = np.random.randn(*r.rows.shape); r.rows[:, -2:] = 0; r.pos = 1000
times = {k: [] for k in ["sb3_sac", *ARMS]}
for rnd in range(7):
    t = time.process_time(); model.learn(20, reset_num_timesteps=False); times["sb3_sac"].append((time.process_time() - t) * 50)
    for a, (agent, replay, cfg) in made.items():
        t = time.process_time()
        for _ in range(20):
            act = agent.explore(obs); o, r, te, tr, _ = env.step(act); replay.add(obs, act, o, r, te, te or tr)
            obs = env.reset()[0].astype(np.float32) if te or tr else o.astype(np.float32)
            for _ in range(cfg.utd): agent.update(replay)
        times[a].append((time.process_time() - t) * 50)
base = np.median(times["sb3_sac"])
for k, v in times.items(): print("ratio", k, "median ms", round(float(np.median(v)), 2), "min", round(min(v), 2), "of SB3 SAC (median)", round(float(np.median(v) / base), 2), "(min)", round(min(v) / min(times["sb3_sac"]), 2), flush=True)
