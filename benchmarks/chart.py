"""Decoding against batch size as one picture: ms a token, and share of the memory's limit.

    python -m benchmarks.chart [--results benchmarks/results] [--out docs/images/decode.png]

Draws what `ambidex bench decode --json cpu-decode-*.json` left in the folder, a row for each shape,
and beside it vLLM's times from `benchmarks.peers.vs_vllm --json cpu-vs-vllm-*.json`, if there are
any. matplotlib draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import AmbidexError, require

RESULTS: Final = Path("benchmarks/results")
PICTURE: Final = Path("docs/images/decode.png")
PATTERNS: Final = ("cpu-decode-*.json", "cpu-vs-vllm-*.json")
DENSE: Final = "dense"
VLLM: Final = "vLLM (dense)"
INK, GRID = "#1f2937", "#e5e7eb"
COLOURS: Final = ("#2563eb", "#0d9488", "#9333ea", "#be123c")  # of the sparse lines
DENSE_COLOUR, VLLM_COLOUR = "#6b7280", "#ea580c"

Points = dict[int, float]  # by batch size


@dataclass(frozen=True)
class Lines:
    """What is drawn of one shape: points by label.

    Attributes:
        milliseconds: a token of each request.
        shares: of the memory's limit, 1 is the limit.
    """

    milliseconds: dict[str, Points]
    shares: dict[str, Points]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of the folder's decoding benchmarks."""
    files = sorted(file for pattern in PATTERNS for file in folder.glob(pattern))
    return [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]


def lines_by_shape(records: Iterable[Mapping[str, Any]]) -> dict[str, Lines]:
    """The lines of every shape that `engine_decode` records name, ascending in batch size.

    The dense line and the limit come from the model with the fewest experts: dense is the same
    computation in all of them.
    """
    kept = sorted(records, key=_order)
    shapes: dict[str, Lines] = {}
    for record in kept:
        if record["name"] == "engine_decode":
            params = record["params"]
            lines = shapes.setdefault(params["shape"], Lines({}, {}))
            _add(lines, DENSE, params, record["peer_value"], params["dense_share_of_limit"])
            label = f"{params['k']} of {params['E']} experts"
            if params["routing"] == "same":
                label += ", all the same"
            _add(lines, label, params, record["value"], params["sparse_share_of_limit"])
    for record in kept:
        kind, _, batch = str(record["params"].get("case", "")).partition(":")
        if record["params"]["shape"] in shapes and kind == "decode":
            points = shapes[record["params"]["shape"]].milliseconds.setdefault(VLLM, {})
            points.setdefault(int(batch), record["peer_value"])
    return shapes


def _order(record: Mapping[str, Any]) -> tuple[int, str, int]:
    """Fewest experts first, own experts before the same, small batches first."""
    params = record["params"]
    batch = str(params.get("case", "")).partition(":")[2] or params.get("batch", 0)
    return params.get("E", 0), params.get("routing", ""), int(batch)


def _add(
    lines: Lines, label: str, params: Mapping[str, Any], milliseconds: float, share: float
) -> None:
    """Add a point, unless there is one."""
    lines.milliseconds.setdefault(label, {}).setdefault(params["batch"], milliseconds)
    lines.shares.setdefault(label, {}).setdefault(params["batch"], share)


def draw(shapes: Mapping[str, Lines], note: str, path: Path) -> None:
    """Write the picture: a row of two panels for each shape."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9.0, 3.4 * len(shapes) + 0.4), layout="constrained")
    panels = figure.subplots(len(shapes), 2, squeeze=False)
    for (left, right), (shape, lines) in zip(panels, shapes.items(), strict=True):
        _panel(left, lines.milliseconds, f"{shape}: ms a token of each request")
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter("{x:g}")
        left.minorticks_off()
        _panel(right, lines.shares, f"{shape}: share of the memory's limit")
        top = max(1.0, *(share for points in lines.shares.values() for share in points.values()))
        right.set_ylim(0, 1.05 * top)
        right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        right.axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for panel in panels[-1]:
        panel.set_xlabel("requests decoded together", color=INK)
    panels[0][0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel(note, fontsize=7.5, color=DENSE_COLOUR)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def _panel(panel: Any, lines: Mapping[str, Points], title: str) -> None:
    """The lines over batch size, on a logarithmic axis that names every size."""
    colours = iter(COLOURS)
    fixed = {DENSE: DENSE_COLOUR, VLLM: VLLM_COLOUR}
    for label, points in lines.items():
        sizes = sorted(points)
        panel.plot(
            sizes,
            [points[size] for size in sizes],
            label=label,
            color=fixed.get(label) or next(colours, INK),
            linestyle="--" if label.endswith("same") else "-",
            linewidth=1.8,
            marker="o",
            markersize=4,
        )
    ticks = sorted({size for points in lines.values() for size in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_title(title, fontsize=10, loc="left", color=INK)
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, length=0, labelsize=9)
    panel.minorticks_off()
    for name, spine in panel.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GRID)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--out", type=Path, default=PICTURE, help=f"default: {PICTURE}")
    given = parser.parse_args(arguments)
    records = read_records(given.results)
    shapes = lines_by_shape(records)
    require(
        bool(shapes),
        f"--results {given.results} holds no {PATTERNS[0]} of `ambidex bench decode`",
    )
    first = next(record for record in records if record["name"] == "engine_decode")
    note = f"{first['machine']}, {first['params']['threads']} threads, {first['params']['dtype']}"
    draw(shapes, f"{note}, torch {first['versions']['torch']}; random weights", given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    try:
        main()
    except AmbidexError as error:
        sys.exit(f"error: {error}")
