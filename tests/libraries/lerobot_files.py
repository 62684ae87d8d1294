"""
A dataset that LeRobot's own writer makes, and what its own reader gets out of it.

Run by an interpreter that has LeRobot: ``python lerobot_files.py FOLDER`` writes ``lerobot/`` and ``lerobot.npz``.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

STATE, ACTION, CAMERA = "observation.state", "action", "observation.images.top"
FEATURES = {
    STATE: {"dtype": "float32", "shape": (3,), "names": ["x", "y", "angle"]},
    ACTION: {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    CAMERA: {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
}


def main(folder):
    rng = np.random.default_rng(0)
    written = LeRobotDataset.create("me/test", fps=10, features=FEATURES, root=folder / "lerobot", use_videos=True)
    for length, success in ((6, True), (4, False), (5, True)):
        for step in range(length):
            last = step == length - 1
            # smooth, as what a camera sees: compression changes little
            ramp = np.linspace(0, 40, 96)[None, :, None] + np.linspace(0, 40, 64)[:, None, None] + 20 * step
            written.add_frame(
                {
                    STATE: rng.normal(size=3).astype(np.float32),
                    ACTION: rng.uniform(-90, 90, 2).astype(np.float32),
                    "next.reward": np.array([float(last and success)], np.float32),
                    "next.done": np.array([last]),
                    "next.success": np.array([last and success]),
                    CAMERA: np.broadcast_to(ramp, (64, 96, 3)).astype(np.uint8),
                    "task": "push",
                }
            )
        written.save_episode()
    written.finalize()
    frames = LeRobotDataset("me/test", root=folder / "lerobot")
    items = [frames[i] for i in range(len(frames))]
    arrays = {key: np.stack([np.asarray(item[key]) for item in items]) for key in (*FEATURES, "episode_index")}
    np.savez_compressed(folder / "lerobot.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
