"""What the runs of the quality study say: every method beside plain fine-tuning, and auto beside the best λ."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from _paired import paired_in_groups, spread

SHOWN = ("f1_macro", "nll", "ece")
HIGHER_IS_BETTER = ("f1_macro",)
# By which the best λ is chosen, on the test texts; names of methods with a constant λ begin with CONSTANT.
CHOOSER, CONSTANT = "f1_macro", "l2sp "
# By seed, of one method in one cell.
Found = dict[int, dict[str, float]]


def cells_of(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Found]]:
    """Scores by data set and shots, method, seed."""
    cells: dict[tuple[str, int], dict[str, Found]] = {}
    for run in runs:
        cell = cells.setdefault((run["data"], run["shots"]), {})
        cell.setdefault(run["method"], {})[run["seed"]] = run["scores"]
    return cells


def beside(found: Found, other: Found, score: str) -> list[float]:
    """Differences on the draws that both have."""
    return [found[seed][score] - other[seed][score] for seed in sorted(found) if seed in other]


def by_method(runs: list[dict[str, Any]], shots: int) -> list[dict[str, Any]]:
    """A row per method: what it adds to plain fine-tuning, per data set and in the mean of the data sets.

    The interval is that of a bootstrap over data sets and the draws in each; a win is a draw on which the method is
    better than plain. A data set on which few of the methods were tried is left out, and a method tried on one alone.
    """
    cells = {data: cell for (data, at), cell in cells_of(runs).items() if at == shots}
    most = max(map(len, cells.values()))
    cells = {data: cell for data, cell in cells.items() if 2 * len(cell) > most}
    methods = list(dict.fromkeys(method for cell in cells.values() for method in cell))
    rows = []
    for method in methods:
        row: dict[str, Any] = {"method": method, "sets": {}, "all": {}}
        for score in SHOWN:
            groups: list[list[float]] = []
            for data, cell in cells.items():
                if method not in cell:
                    continue
                part = row["sets"].setdefault(data, {"draws": len(cell[method])})
                part[score] = spread([scores[score] for scores in cell[method].values()])
                groups.append(beside(cell[method], cell["plain"], score))
                part[score]["added"] = statistics.mean(groups[-1])
            sign, added = 1 if score in HIGHER_IS_BETTER else -1, [value for group in groups for value in group]
            row["all"][score] = {**paired_in_groups(groups), "wins": sum(sign * value > 0 for value in added)}
            row["draws"] = len(added)
        if len(row["sets"]) > 1 or len(cells) == 1:
            rows.append(row)
    return rows


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def tried_strengths(cell: dict[str, Found]) -> dict[float, Found]:
    """By λ, the runs with a constant one."""
    return {float(name.removeprefix(CONSTANT)): found for name, found in cell.items() if name.startswith(CONSTANT)}


def best_of(gains: dict[float, float]) -> float:
    """The λ that gains most; the smallest of several."""
    return max(gains, key=lambda value: (gains[value], -value))


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By data set and shots, all texts (0) last."""
    return sorted(rows, key=lambda row: (row["data"], row["shots"] or 10**9))


def beside_oracle(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set and shots: auto beside plain, and beside the constant λ that is best *on the test texts*.

    Such an oracle is what no search on validation texts can beat. `error` is the standard error of the mean
    difference over the draws, `own_error` that of the other's own mean. Of the grid those λ take part that were tried
    on the most draws.
    """
    rows = []
    for (data, shots), cell in cells_of(runs).items():
        auto, plain = cell.get("auto", {}), cell["plain"]
        if not auto:
            continue
        row: dict[str, Any] = {"data": data, "shots": shots, "draws": len(auto)}
        tried = tried_strengths(cell)
        most = max(map(len, tried.values()), default=0)
        tried = {value: found for value, found in tried.items() if len(found) == most}
        draws = set.intersection(*map(set, tried.values())) if tried else set(plain)
        grid = {0.0: {seed: scores for seed, scores in plain.items() if seed in draws}, **tried}
        gains = {value: statistics.mean(beside(found, plain, CHOOSER)) for value, found in grid.items()}
        best = best_of(gains)
        row["grid"], row["best"] = sorted(grid), best
        for name, other in (("plain", plain), ("oracle", grid[best])):
            row[name] = {}
            for score in SHOWN:
                added = beside(auto, other, score)
                own = [found[score] for seed, found in other.items() if seed in auto]
                row[name][score] = {
                    "auto_adds": statistics.mean(added),
                    "error": standard_error(added),
                    "draws": len(added),
                    "own_mean": statistics.mean(own),
                    "own_error": standard_error(own),
                }
        for score in SHOWN:
            row[score] = {
                name: statistics.mean(found[seed][score] for seed in auto if seed in plain)
                for name, found in (("plain", plain), ("auto", auto))
            }
        rows.append(row)
    return in_order(rows)


def beside_other_draws(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set and shots: auto beside the constant λ that is best on the test texts of the *other* draws.

    The best λ of the draws that it is scored on has their luck, too. Here every draw is scored with the λ that has the
    best mean of the others, 0 among the grid; a λ takes part where both that draw and another have been trained with
    it. `differences` are those of the draws, by score.
    """
    rows = []
    for (data, shots), cell in cells_of(runs).items():
        auto, plain = cell.get("auto", {}), cell["plain"]
        grid = {0.0: plain, **tried_strengths(cell)}
        row: dict[str, Any] = {"data": data, "shots": shots, "chosen": {}, "differences": {s: [] for s in SHOWN}}
        for seed in sorted(set(auto) & set(plain)):
            gains = {
                value: statistics.mean(beside({s: f for s, f in found.items() if s != seed}, plain, CHOOSER))
                for value, found in grid.items()
                if seed in found and len(set(found) & set(plain)) > 1
            }
            if len(gains) < 2:
                continue
            best = best_of(gains)
            row["chosen"][str(seed)] = best
            for score in SHOWN:
                row["differences"][score].append(auto[seed][score] - grid[best][seed][score])
        if row["chosen"]:
            rows.append(row)
    return in_order(rows)


def overall(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What auto adds to plain in the mean over all data sets and shots; intervals as in `by_method`."""
    cells = [cell for cell in cells_of(runs).values() if "auto" in cell]
    return mean_of_cells({score: [beside(cell["auto"], cell["plain"], score) for cell in cells] for score in SHOWN})


def mean_of_cells(groups: dict[str, list[list[float]]]) -> dict[str, Any]:
    """By score, of the differences of each cell's draws."""
    cells = len(groups[SHOWN[0]])
    return {"cells": cells, **{s: paired_in_groups(found) for s, found in groups.items()}} if cells else {}


def strengths(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set and shots: λ of auto in the second half of training, in the mean over steps, by draw."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        course = run["course"]["l2sp_lambda"] if run["method"] == "auto" else []
        if course:
            row = rows.setdefault(
                (run["data"], run["shots"]), {"data": run["data"], "shots": run["shots"], "rows": [], "lambda": []}
            )
            row["lambda"].append(statistics.mean(course[len(course) // 2 :]))
            row["rows"].append(run["rows"])
    return sorted(rows.values(), key=lambda row: (row["data"], statistics.mean(row["rows"])))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All of it, for the file of results; the methods at the number of shots that most runs have."""
    counts = Counter(run["shots"] for run in runs)
    shots = max(counts, key=lambda each: (counts[each], -each))
    others = beside_other_draws(runs)
    return {
        "shots": shots,
        "methods": by_method(runs, shots),
        "oracle": beside_oracle(runs),
        "other_draws": others,
        "overall": overall(runs),
        "overall_other_draws": mean_of_cells({s: [row["differences"][s] for row in others] for s in SHOWN}),
        "strengths": strengths(runs),
    }
