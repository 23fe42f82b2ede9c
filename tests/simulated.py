"Records of issue B in their real form with numbers from formulas: what the results pages read, without a network."
import json

import numpy as np
import pandas as pd
import torch

from patchmix_repro import store
from patchmix_repro.curves import strip
from patchmix_repro.explaining import Explained, OccludedBatch
from patchmix_repro.explanations import pack_pictures

CONDITIONS = [
    ("clean", "clean", None, 0.0),
    *((f"replace-{g}-{s}", "replace", g, float(s)) for g in (14, 7) for s in range(10, 60, 10)),
    *((f"permute-{cells}", "permute", round(cells**0.5), float(cells)) for cells in (4, 16, 64, 196)),
    *((f"drop-14-{s}-black-random", "drop", 14, float(s)) for s in range(20, 100, 20)),
    *((f"paste-embedded-{s}", "paste", None, float(s)) for s in (10, 20)),
    *((f"slide-25-{50 + 25 * k}", "slide", None, 0.25 * k) for k in (-1, 0, 1)),
]
LOSS = {("convnext", "timm"): 0.8, ("convnext", "switch"): 0.5, ("swin", "timm"): 0.55, ("swin", "switch"): 0.5, ("deit", "timm"): 0.6, ("deit", "switch"): 0.4}
NETWORKS = [(model, mixing, seed) for model, mixing in LOSS for seed in range(3)]
MANIFEST = {"test": "0" * 64}


def config(model, mixing, seed, data="shapes9", scale="mini"):
    return {"model": model, "mixing": mixing, "run_id": f"{data}-{model}-{mixing}-{seed}", "scale": scale, "data": data, "split": "test", "train_seed": seed, "train_grid": 7}


def noise(*key):
    return np.random.default_rng([ord(letter) for letter in "".join(map(str, key))])


def battery_table(model, mixing, seed, n=900, chance=1 / 9):
    "Kept falls linearly with the place on the curve, by the recipe's LOSS at its end; the seed adds 0.01."
    rows, rng = [], noise(model, mixing, seed)
    clean = 0.61 + 0.01 * rng.normal()
    for condition, kind, grid, x in CONDITIONS:
        ends = {"clean": 1, "replace": 50, "permute": 196, "drop": 80, "paste": 20, "slide": 1}
        lost = 0.0 if kind == "clean" else LOSS.get((model, mixing), 0.5) * (0.3 if kind == "slide" else x / ends[kind]) + 0.01 * rng.normal()
        accuracy = clean - lost * (clean - chance)
        rows.append({"condition": condition, "kind": kind, "grid": grid, "share": x / 100, "x": x, "n": n, "correct": round(n * accuracy), "accuracy": accuracy,
                     "low": accuracy - 0.03, "high": accuracy + 0.03, "drop": clean - accuracy, "drop_low": clean - accuracy - 0.03, "drop_high": clean - accuracy + 0.03,
                     "drop_normalised": lost, "in_distribution": (kind, grid, mixing) == ("replace", 7, "switch"), "discriminates": lost >= 0.05, "reason": "" if lost >= 0.05 else "no effect"})
    return pd.DataFrame(rows)


def battery(model, mixing, seed, **where):
    table = battery_table(model, mixing, seed)
    metrics = {"clean": float(table["accuracy"][0]), "n": 900}
    return store.new_record("battery", config(model, mixing, seed, **where), seed=0, data=MANIFEST, metrics=metrics, tables={"conditions": table})


def published_set(name, data, correct, n):
    "A network on one of the published sets, clean and under a condition that no table may show."
    table = pd.DataFrame([{"condition": condition, "n": n, "accuracy": right / n, "low": right / n - 0.03, "high": right / n + 0.03} for condition, right in (("clean", correct), ("permute-4", 1))])
    return store.new_record("battery", config(name, None, 0, data, "paper") | {"name": name, "limit": n}, seed=0, data=MANIFEST, metrics={"clean": correct / n}, tables={"conditions": table})


def selectivity(model, mixing, seed, images="patch", **where):
    rng, mass = noise(model, mixing, seed, images), 0.3 - 0.25 * LOSS[model, mixing]
    table = pd.DataFrame({"id": range(100), "file": [f"{k}.png" for k in range(100)], "label": 0, "donor_label": 1, "share": 0.3, "correct": True})
    table = table.assign(mass=rng.normal(mass, 0.05, 100), mean=rng.normal(0.5 + mass, 0.05, 100), mass_chance=0.0, mean_chance=0.5, mass_gauss=0.02, mean_gauss=0.51)
    asked = config(model, mixing, seed, **where) | {"set": images, "masks": 500, "contrast": {"patch": "donor", "smd": "runner_up"}[images]}
    return store.new_record("selectivity", asked, seed=0, data=MANIFEST, metrics={"mass": float(table["mass"].mean())}, tables={"images": table}, attachments={"explained.npz": explained(rng)})


def explained(rng, side=16):
    "Two images with maps: the first answer is right, the second wrong."
    images, own = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)), torch.ones(2, 1, side, side, dtype=torch.bool)
    own[..., : side // 2] = False
    ids = torch.arange(2)
    return pack_pictures(Explained(OccludedBatch(ids, images, ids, None, own), torch.from_numpy(rng.random((2, side, side))), torch.tensor([0, 0])))


def sheets(names, data="shapes9", count=8):
    images = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    files = {f"{name}.png": strip(images) for name in names}
    files["captions.json"] = json.dumps({name: [f"{name} {k}" for k in range(count)] for name in names}).encode()
    return store.new_record("pictures", {"data": data}, seed=0, data=MANIFEST, metrics={}, attachments=files)


def fill(folder, networks=NETWORKS, **where):
    "Everything the pages read, for these networks."
    for network in networks:
        store.append(battery(*network, **where), folder)
        for images in ("patch", "smd"):
            store.append(selectivity(*network, images, **where), folder)
    return folder
