"""
Several ways: python toys.py --env TwoGoals|Ring --steps N --seeds 0 1 2 ARM...   (appends to toys.jsonl)

TwoGoals: a point starts at the origin and walks 8 steps, at most 0.25 a step and axis; two goals (+-1, 0);
reward 1 - distance to the nearer goal. Ring: one step, eight modes at radius 0.8, the even ones are worth 1, the odd 0.5.
"""
import argparse, json, math, time
import gymnasium as gym, numpy as np, torch as th
import lab

class TwoGoals(gym.Env):
    observation_space = gym.spaces.Box(-3, 3, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.p, self.t = self.np_random.normal(0, 0.02, 2), 0
        return self._obs(), {}
    def _obs(self): return np.array([*self.p, self.t / 8], np.float32)
    def step(self, a):
        self.p, self.t = np.clip(self.p + 0.25 * np.clip(a, -1, 1), -2, 2), self.t + 1
        d = min(math.hypot(self.p[0] - 1, self.p[1]), math.hypot(self.p[0] + 1, self.p[1]))
        return self._obs(), 1 - d, self.t == 8, False, {}

class Ring(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    modes = 0.8 * np.array([[math.cos(math.pi * k / 4), math.sin(math.pi * k / 4)] for k in range(8)])
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed); return np.zeros(1, np.float32), {}
    def step(self, a):
        d = ((self.modes - a) ** 2).sum(1); k = int(d.argmin())
        return np.zeros(1, np.float32), (1.0 if k % 2 == 0 else 0.5) * math.exp(-d[k] / (2 * 0.15**2)), True, False, {}

gym.register("TwoGoals-v0", lambda: TwoGoals()); gym.register("Ring-v0", lambda: Ring())

@th.no_grad()
def shares(agent, env_id, n=400):
    if env_id == "Ring":
        a = agent.sampled(np.zeros((2000, 1), np.float32)); env = Ring()
        d = ((env.modes[None] - a[:, None]) ** 2).sum(2); k = d.argmin(1); near = d.min(1) < 0.3**2
        r = np.where(k % 2 == 0, 1, 0.5) * np.exp(-d.min(1) / (2 * 0.15**2))
        return {"share": [round(float(((k == i) & near).mean()), 3) for i in range(8)], "return": round(float(r.mean()), 3)}
    envs = [TwoGoals() for _ in range(n)]
    obs = np.stack([e.reset(seed=i)[0] for i, e in enumerate(envs)]); ret = np.zeros(n)
    for _ in range(8):
        out = [e.step(a) for e, a in zip(envs, agent.sampled(obs))]
        obs = np.stack([o[0] for o in out]); ret += [o[1] for o in out]
    x = obs[:, 0]
    return {"share": [round(float((x < -0.7).mean()), 3), round(float((x > 0.7).mean()), 3)], "return": round(float(ret.mean()), 3)}

p = argparse.ArgumentParser(); p.add_argument("--env"); p.add_argument("--steps", type=int, default=4000); p.add_argument("--seeds", type=int, nargs="+", default=[0]); p.add_argument("arms", nargs="+")
args = p.parse_args(); th.set_num_threads(1)
for arm in args.arms:
    for seed in args.seeds:
        t = time.process_time()
        r = lab.train(arm + "+width=64+batch=128" + ("" if "starts" in arm else "+starts=500"), args.env + "-v0", args.steps, seed, 10**9, 1, after=lambda agent: {**shares(agent, args.env), "w": round(agent.log_weight.exp().item(), 4), "cost": round(agent.last["cost"].mean().item(), 2)})
        rec = {"arm": arm, "env": args.env, "steps": args.steps, "seed": seed, **r, "cpu_s": round(time.process_time() - t, 1)}
        print(rec, flush=True); open("toys.jsonl", "a").write(json.dumps(rec) + "\n")
