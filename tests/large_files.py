"""
What loading a large file costs: memory, and time as a ratio to reading its arrays and copying them.

python -m tests.large_files write images.hdf5 100000                      # 84 x 84 x 3 images, as D4RL lays files out
python -m tests.large_files write halfcheetah_medium-v2.hdf5 1000000      # 17 + 6 numbers, D4RL
python -m tests.large_files write cheetah-x-v0.npz 1000000                # 17 + 6 numbers, OGBench
python -m tests.large_files load images.hdf5 mapped                       # or: memory, sb3

``load`` prints as JSON the seconds, their ratio to reading and copying, the largest anonymous memory while the file is loaded
and batches are drawn, in MiB above that of the same process with the model and its empty buffer, its share of the bytes of the
images (or else of SB3's buffer), and a digest of the batches.
"""

import hashlib
import json
import sys
import tempfile
import threading
import time

import h5py
import numpy as np
from gymnasium import spaces

LENGTH = 500  # of an episode
IMAGE = (84, 84, 3)


def arrays(n, ogbench):
    rng = np.random.default_rng(0)
    episode, step = np.divmod(np.arange(n), LENGTH)
    last = step == LENGTH - 1
    flags = {"terminals": last} if ogbench else {"terminals": last & (episode % 2 == 0), "timeouts": last & (episode % 2 == 1)}
    rewards = {} if ogbench else {"rewards": rng.normal(size=n).astype(np.float32)}
    return {**rewards, **flags}, rng


def write(path, n):
    found, rng = arrays(n, path.endswith(".npz"))
    size = (2,) if "images" in path else (6,)
    found["actions"] = rng.uniform(-1, 1, (n, *size)).astype(np.float32)
    if path.endswith(".npz"):
        states = rng.normal(size=(n, 17)).astype(np.float32)
        np.savez(path, observations=states, qpos=states[:, :9], **found)
        return
    with h5py.File(path, "w") as file:
        for key, array in found.items():
            file[key] = array
        if "images" not in path:
            file["observations"] = rng.normal(size=(n, 17)).astype(np.float32)
            return
        images = file.create_dataset("observations", (n, *IMAGE), np.uint8)
        for first in range(0, n, LENGTH):
            images[first : first + LENGTH] = rng.integers(0, 256, (min(LENGTH, n - first), *IMAGE), np.uint8)


def read_and_copy(path):
    """Seconds of reading all arrays, and copying them."""
    start = time.perf_counter()
    with np.load(path) if path.endswith(".npz") else h5py.File(path) as file:
        for key in set(file) - {"qpos"}:
            np.array(file[key][:])
    return time.perf_counter() - start


def anonymous():
    """Memory of this process that no file backs, in MiB."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) / 1024


class Peak(threading.Thread):
    """Watches the memory until it is asked."""

    def __init__(self):
        super().__init__(daemon=True)
        self.asked, self.highest = threading.Event(), anonymous()

    def run(self):
        while not self.asked.wait(0.005):
            self.highest = max(self.highest, anonymous())

    def ask(self):
        self.asked.set()
        self.join()
        return max(self.highest, anonymous())


def load(path, kind):
    from sb3_consistency import CPQL, ConsistencyBC, FrameReplayBuffer
    from tests.conftest import SMALL, VectorEnv

    with np.load(path) if path.endswith(".npz") else h5py.File(path) as file:
        n, has_rewards = len(file["actions"]), "rewards" in file
    images = "images" in path
    space = spaces.Box(0, 255, IMAGE, np.uint8) if images else spaces.Box(-np.inf, np.inf, (17,), np.float32)
    env = VectorEnv(space)
    env.action_space = spaces.Box(-1, 1, (2 if images else 6,), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        kwargs = {"replay_buffer_class": FrameReplayBuffer} if kind != "sb3" else {}
        kwargs["replay_buffer_kwargs"] = {"folder": folder} if kind == "mapped" else {}
        cls = CPQL if has_rewards else ConsistencyBC
        policy = "CnnPolicy" if images else "MlpPolicy"
        model = cls(policy, env, buffer_size=n, **kwargs, **SMALL)
        before, peak, digest = anonymous(), Peak(), hashlib.sha256()
        peak.start()
        start = time.perf_counter()
        model.load_dataset(path)
        seconds = time.perf_counter() - start
        for seed in range(4):
            np.random.seed(seed)
            for tensor in model.replay_buffer.sample(256):
                if tensor is not None:
                    digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        mebibytes = peak.ask() - before
        row = int(np.prod(IMAGE)) if images else 4 * (2 * 17 + 6 + 3)
    figures = {
        "seconds": seconds,
        "ratio": seconds / read_and_copy(path),
        "MiB": mebibytes,
        "share": mebibytes * 2**20 / n / row,
    }
    print(json.dumps({**{key: round(value, 3) for key, value in figures.items()}, "batches": digest.hexdigest()}))


if __name__ == "__main__":
    command, path, argument = sys.argv[1:]
    write(path, int(argument)) if command == "write" else load(path, argument)
