"""
Compare two checkouts: weights and actions bit for bit, CPU time, lines of code.

    python house.py digests OLD NEW
    python house.py speed OLD NEW --rounds 17 --core 0
    python house.py lines TREE
"""

import argparse
import ast
import hashlib
import io
import pathlib
import statistics
import subprocess
import sys
import time
import tokenize

NAMES = ("CPQL", "ConsistencyAC", "DiffusionQL", "ConsistencyBC", "DiffusionBC", "RACTD")
CALLS = {"step": 32, "predict": 400, "sample": 100}


def make(name: str):
    import gymnasium as gym
    import numpy as np
    from gymnasium import spaces

    import sb3_consistency

    class Env(gym.Env):
        observation_space = spaces.Box(-1, 1, (17,), np.float32)
        action_space = spaces.Box(-1, 1, (6,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self.np_random.normal(size=17).astype(np.float32), {}

        def step(self, action):
            self.steps += 1
            return self.np_random.normal(size=17).astype(np.float32), float(action.sum()), False, self.steps >= 60, {}

    n, rng = 5000, np.random.default_rng(0)
    data = {
        "observations": rng.normal(size=(n, 17)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 6)).astype(np.float32),
        "rewards": rng.normal(size=n),
        "next_observations": rng.normal(size=(n, 17)).astype(np.float32),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 500 == 499,
    }
    model = getattr(sb3_consistency, name)("MlpPolicy", Env(), seed=0, device="cpu", batch_size=256)
    return model, data


def worker(tree: str, names: list[str]) -> None:
    """Speed: answers "what name n" on standard input with CPU seconds."""
    import numpy as np
    import torch as th

    th.set_num_threads(1)
    models = {}
    for name in names:
        models[name], data = make(name)
        models[name].load_dataset(data)
        models[name].pretrain(5)
    obs = np.zeros((1, 17), np.float32)
    print("ready", flush=True)
    for line in sys.stdin:
        what, name, n = line.split()
        start = time.process_time()
        if what == "step":
            models[name].train(int(n), 256)
        else:
            for _ in range(int(n)):
                models[name].predict(obs, deterministic=what == "predict")
        print(time.process_time() - start, flush=True)


def digest(names: list[str]) -> None:
    """200 gradient steps on data, 200 environment steps where there are any, and predictions of both kinds."""
    import numpy as np
    import torch as th

    th.set_num_threads(1)
    for name in names:
        model, data = make(name)
        model.load_dataset(data)
        model.pretrain(200)
        if not model.offline_only and name != "RACTD":
            model.learn(200)
        content = hashlib.sha256()
        for key, value in sorted(model.policy.state_dict().items()):
            content.update(key.encode() + value.numpy().tobytes())
        th.manual_seed(1)
        for deterministic in (True, False):
            content.update(np.asarray(model.predict(np.ones((3, 17), np.float32), deterministic=deterministic)[0]).tobytes())
        print(name, content.hexdigest()[:16], flush=True)


def start(tree: str, *arguments: str, core: str = "0") -> subprocess.Popen:
    import os

    command = ["taskset", "-c", core, sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(tree).resolve())}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment)


def speed(trees: list[str], names: list[str], rounds: int, core: str) -> None:
    workers = [start(tree, "worker", tree, "--names", *names, core=core) for tree in trees]
    for process in workers:
        while process.stdout.readline().strip() != "ready":
            pass

    def ask(process, question: str) -> float:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    for what, n in CALLS.items():
        for name in names:
            times = []
            for i in range(rounds):
                order = (0, 1) if i % 2 == 0 else (1, 0)
                taken = {j: ask(workers[j], f"{what} {name} {n}") for j in order}
                times.append((taken[0], taken[1]))
            times = times[1:]
            low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
            old, new = (statistics.median(x) / n * 1000 for x in zip(*times))
            print(f"{what:8}{name:15}old / new {middle:.3f} ({low:.3f}, {high:.3f})  {old:.4f} / {new:.4f} ms", flush=True)
    for process in workers:
        process.kill()


def code_lines(path: pathlib.Path) -> int:
    """Lines without blanks, comments and docstrings."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digests", "speed", "lines", "worker", "digest"))
    parser.add_argument("trees", nargs="*")
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--rounds", type=int, default=17)
    parser.add_argument("--core", default="0")
    args = parser.parse_args()
    if args.what == "worker":
        worker(args.trees[0], args.names)
    elif args.what == "digest":
        digest(args.names)
    elif args.what == "speed":
        speed(args.trees, args.names, args.rounds, args.core)
    elif args.what == "digests":
        old, new = (start(tree, "digest", "--names", *args.names, core=args.core).communicate()[0] for tree in args.trees)
        print("the same" if old == new else f"DIFFERENT\n{old}\n{new}")
    else:
        root = pathlib.Path(args.trees[0]) / "sb3_consistency"
        rooms: dict[str, int] = {}
        for path in root.rglob("*.py"):
            room = path.relative_to(root).parts[0] if path.parent != root else "(top)"
            rooms[room] = rooms.get(room, 0) + code_lines(path)
        for room, n in sorted(rooms.items(), key=lambda x: -x[1]):
            print(f"{n:6} {n / sum(rooms.values()):5.0%} {room}")
        print(f"{sum(rooms.values()):6}      all")


if __name__ == "__main__":
    main()
