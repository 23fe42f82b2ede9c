"Records of ReMixer runs in their agreed form with numbers from formulas."
import numpy as np
import pandas as pd

from patchmix_repro import store

LEVEL = {"original": 0.80, "only_bg_b": 0.40, "only_bg_t": 0.42, "no_fg": 0.45, "only_fg": 0.55, "mixed_same": 0.72, "mixed_rand": 0.50, "mixed_next": 0.50}
GAIN = {"original": 0.05, "only_bg_b": -0.08, "only_bg_t": 0.01, "no_fg": 0.0, "only_fg": 0.06, "mixed_same": 0.06, "mixed_rand": 0.10, "mixed_next": 0.10}
MANIFEST = {"test": "0" * 64}


def noise(*key):
    return np.random.default_rng([ord(letter) for letter in "".join(map(str, key))])


def name_of(model, labels, seed, mixing="timm", tokens=False):
    return f"{model}-{mixing}-{labels.replace(':', '_')}-{'t' * tokens}s{seed}"


def train(model, labels, seed, mixing="timm", tokens=False, layers=8, remixer=None, **where):
    remixer = labels != "none" if remixer is None else remixer
    config = {"model": model, "scale": "mini", "data": "shapes9", "mixing": mixing, "seed": seed, "remixer": remixer, "labels": labels, "token_labels": tokens} | where
    quarter = np.repeat([1, 2, 3, 4], layers // 4)
    kappa = pd.DataFrame({"layer": np.arange(layers), "quarter": quarter, "kappa": (np.array([1.2, 0.8, 0.4, 0.0])[quarter - 1] + 0.02 * noise(model, labels, seed).random(layers))})
    return store.new_record("train", config, seed=seed, data={"train": "0" * 64}, run_id=name_of(model, labels, seed, mixing, tokens), tables={"kappa": kappa} if remixer else None,
                            metrics={"test_top1": 0.8 + 0.05 * remixer + 0.002 * noise("t", model, labels, seed).normal(), "test_images": 5040})


def table(levels, key, n=5040):
    accuracy = np.array(list(levels.values())) + 0.003 * noise(*key).normal(size=len(levels))
    return pd.DataFrame({"variant": list(levels), "n": n, "correct": (n * accuracy).round().astype(int), "accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01})


def note(model, labels, seed, mixing, data, tested=None, tokens=False):
    name = name_of(model, labels, seed, mixing, tokens)
    return {"name": name, "model": model, "mixing": mixing, "scale": "mini", "run_id": name, "train_data": "shapes9", "train_seed": seed, "labels": tested or labels, "data": data}


def backgrounds(model, labels, seed, mixing="timm", gain=None, tested=None):
    gain = float(labels not in ("none", "constant") and not labels.startswith("shuffled")) if gain is None else gain
    levels = {name: LEVEL[name] + gain * GAIN[name] for name in LEVEL}
    rows = table(levels, (model, labels, seed))
    images = pd.DataFrame({"id": range(4), "file": list("abcd"), "label": 0} | dict.fromkeys(levels, True))
    run_id = f"bg-{name_of(model, labels, seed, mixing)}-{tested or ''}"
    return store.new_record("backgrounds", note(model, labels, seed, mixing, "shapes9", tested), seed=0, data=MANIFEST, run_id=run_id.rstrip("-").replace(":", "_"), metrics={}, tables={"variants": rows, "images": images})


def shifted(model, labels, seed, data, mixing="timm", variant="original"):
    rows = table({variant: 0.3 + 0.05 * (labels != "none")}, (model, labels, seed, data), 900)
    return store.new_record("shifted", note(model, labels, seed, mixing, data), seed=0, data=MANIFEST, run_id=f"{data}-{name_of(model, labels, seed, mixing)}", metrics={}, tables={"variants": rows})


def relevance(labels, seed):
    rows = table({"object share": 0.1 + 0.1 * (labels != "none")}, ("deit", labels, seed), 500)
    return store.new_record("relevance", note("deit", labels, seed, "timm", "shapes9"), seed=0, data=MANIFEST, run_id=f"map-{name_of('deit', labels, seed)}", metrics={}, tables={"variants": rows})


def fill(folder, seeds=range(4)):
    "All that the pages read."
    for seed in seeds:
        for model in ("deit", "mixer", "convmixer"):
            for labels in ("none", "mask", "dense:in-domain", "shuffled:mask", "constant"):
                store.append(train(model, labels, seed), folder)
                store.append(backgrounds(model, labels, seed), folder)
            for labels in ("none", "mask"):
                for data in ("sketch_9", "shape_texture"):
                    store.append(shifted(model, labels, seed, data), folder)
        for model, labels in (("convit", "none"), ("convit", "dense:in-domain"), ("convmixer_full", "none")):
            store.append(train(model, labels, seed), folder)
            store.append(backgrounds(model, labels, seed, gain={"convit none": 0.5, "convit dense:in-domain": 1.5, "convmixer_full none": 0.9}[f"{model} {labels}"]), folder)
        for remixer in (False, True):
            store.append(train("deit", "dense:in-domain", seed, tokens=True, remixer=remixer) | {"run_id": f"tokens-{remixer}-{seed}"}, folder)
        for labels in ("none", "mask"):
            store.append(relevance(labels, seed), folder)
    return folder
