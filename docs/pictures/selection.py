"""The picture of a selection: query tiles against key blocks of one head of a small trained model.

    python docs/pictures/selection.py            # selection.json -> selection.svg
    python docs/pictures/selection.py --record   # a run of tests/experiments/longlink_model -> selection.json: a minute

The model answers questions whose causes stand far back; the rings show where. Its routers were distilled from its
dense attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD, PICTURE = HERE / "selection.json", HERE / "selection.svg"
LENGTH, BATCHES, SEED = 1024, 24, 1
SPARSE = {
    "block_size": 16,
    "query_tile": 16,
    "sink": 16,
    "local": 16,
    "dense_below": 0,
    "min_keys": 160,
    "max_keys": 160,
}
CELL, LEFT, TOP = 6, 64, 30
KINDS = {"sink": "#8a8f98", "local": "#5b8def", "chosen": "#0b6e4f"}
SAID = {"sink": "first tokens, always kept", "local": "nearby tokens, always kept", "chosen": "chosen by the router"}


def record() -> dict[str, Any]:
    """Blocks kept by the head that finds most causes, for every tile of one sequence, and where the causes stand."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_sparse_attn import SparseCall, distill
    from hf_sparse_attn.experiments.longlink.families import LongLinkConfig
    from hf_sparse_attn.experiments.longlink.planting import plant

    config = LongLinkConfig(length=LENGTH, min_distance=SPARSE["min_keys"] + 16, sequences=BATCHES)
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "tests/experiments/longlink_model", dtype=torch.float32, sparse_attention=SPARSE
    )
    train = torch.from_numpy(plant(config, SEED).input_ids)
    distill(model, [{"input_ids": row[None]} for row in train], progress=False)
    unseen, kept = plant(config, SEED + 1), {}

    class Keeping(SparseCall):
        def on_selection(self, router: Any, inputs: Any, selection: Any) -> None:
            kept.update({(router.layer, head): rows for head, rows in enumerate(selection.indices[0].tolist())})

    with torch.no_grad():
        model.eval()(torch.from_numpy(unseen.input_ids[:1]), use_cache=False, sparse_call=Keeping())
    links = sorted(
        {(link.effect // 16, cause // 16) for link in unseen.links if link.sequence == 0 for cause in link.causes}
    )
    best = max(kept, key=lambda head: (sum(block in kept[head][tile] for tile, block in links), head))
    tiles = [[block for block in row if block >= 0] for row in kept[best]]
    return {
        "model": "tests/experiments/longlink_model",
        "layer": best[0],
        "head": best[1],
        "settings": SPARSE,
        "tiles": tiles,
        "links": links,
    }


def kind(tile: int, block: int) -> str:
    """Why a tile keeps a block: tiles and blocks have 16 tokens, as many as ``sink`` and ``local``."""
    return "sink" if block == 0 else "local" if block >= tile - 1 else "chosen"


def draw(recorded: dict[str, Any]) -> str:
    """The picture as SVG."""
    tiles = recorded["tiles"]
    size = len(tiles) * CELL
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{size}" height="{size}" fill="#ffffff" stroke="#c9ccd1"/>']
    parts.append(f'<path d="M{LEFT} {TOP}H{LEFT + size}V{TOP + size}Z" fill="#f0f1f3"/>')  # keys after the query
    for tile, blocks in enumerate(tiles):
        parts += [_square(tile, block, KINDS[kind(tile, block)]) for block in blocks]
    parts += [_ring(tile, block) for tile, block in recorded["links"]]
    parts += _words(size)
    total, height = LEFT + size + 16, TOP + size + 100
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}"'
    title = "Key blocks that each query tile reads: the first, the nearby and those that a router chose"
    parts = [
        f"<title>{title}</title>",
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        *parts,
    ]  # also on a dark page
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', *parts, "</svg>"]) + "\n"


def _square(tile: int, block: int, colour: str) -> str:
    x, y, side = LEFT + block * CELL, TOP + tile * CELL, CELL - 1
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{colour}"/>'


def _ring(tile: int, block: int) -> str:
    middle = CELL / 2 - 0.5
    at = f'cx="{LEFT + block * CELL + middle}" cy="{TOP + tile * CELL + middle}"'
    return f'<circle {at} r="{CELL}" fill="none" stroke="#c2410c" stroke-width="1.6"/>'


def _words(size: int) -> list[str]:
    middle, below = TOP + size / 2, TOP + size + 22
    parts = [f'<text x="{LEFT + size / 2}" y="{TOP - 10}" text-anchor="middle">key blocks</text>']
    parts.append(
        f'<text text-anchor="middle" transform="translate({LEFT - 14} {middle}) rotate(-90)">query tiles</text>'
    )
    for row, (name, colour) in enumerate(KINDS.items()):
        parts.append(f'<rect x="{LEFT}" y="{below + 18 * row - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{below + 18 * row}">{SAID[name]}</text>')
    ring = below + 18 * len(KINDS)
    parts.append(
        f'<circle cx="{LEFT + 5}" cy="{ring - 4}" r="{CELL}" fill="none" stroke="#c2410c" stroke-width="1.6"/>'
    )
    return [*parts, f'<text x="{LEFT + 18}" y="{ring}">where an answer stands (the router is not told)</text>']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run the model anew, too")
    if parser.parse_args().record:
        sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
        RECORD.write_text(json.dumps(record()) + "\n")
    PICTURE.write_text(draw(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
