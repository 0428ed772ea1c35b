"""A report as plain data with a version: what ``Report.to_json`` writes and the page shows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from ..plan import Plan, Space
from ..report import READ_TEXTS, LayerRow, Report

FORMAT, VERSION = "upscale-report", 1
#: Kinds of reads that leave the channels where they are.
FREE = ("whole", "view")


def as_data(report: Report) -> dict[str, Any]:
    """Everything in ``report`` as dicts, lists, strings and numbers. Pairs are ``{"before": ..., "after": ...}``.

    Times of reads and orders are in nanoseconds by the cost model, for the planned batch; those of stages in seconds.
    What a report without a plan does not know is None or an empty list.
    """
    plan = report.plan
    verified = {"error": _finite(report.error), "batches": list(report.batches)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "mode": None if plan is None else plan.mode,
        "parameters": _pair(report.parameters),
        "flops": _pair(report.flops),
        "verification": None if report.error is None else verified,
        "seconds": dict(report.seconds),
        "reads": _reads(report),
        "orders": [] if plan is None else [asdict(order) for order in plan.orders],
        "spaces": [] if plan is None else _spaces(plan),
        "layers": [_layer(row) for row in report.layers],
        "barriers": [dict(zip(("where", "operator", "reason"), b, strict=True)) for b in report.barriers],
        "kept": [dict(zip(("layer", "side", "channels", "reason"), k, strict=True)) for k in report.kept],
        "notes": list(report.notes),
        "removed": list(report.removed),
    }


def _pair(values: tuple[int, int]) -> dict[str, int]:
    return {"before": values[0], "after": values[1]}


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _layer(row: LayerRow) -> dict[str, Any]:
    pairs = {key: _pair(getattr(row, key)) for key in ("inputs", "outputs", "parameters", "flops")}
    return {"name": row.name, "kind": row.kind, **pairs, "read": row.read}


def _reads(report: Report) -> list[dict[str, Any]]:
    """One entry per kind of read, the free ones first, then by cost."""
    cost: dict[str, float] = defaultdict(float)
    for by_operand in report.plan.reads.values() if report.plan is not None else ():
        for read in by_operand.values():
            cost[read.kind] += read.nanoseconds
    rows = [
        {
            "kind": kind,
            "meaning": READ_TEXTS.get(kind, kind),
            "copies": kind not in FREE,
            "count": count,
            "nanoseconds": None if report.plan is None else cost[kind],
        }
        for kind, count in report.reads.items()
    ]
    return sorted(rows, key=lambda r: (r["copies"], -(r["nanoseconds"] or 0.0), r["kind"]))


def _spaces(plan: Plan) -> list[dict[str, Any]]:
    read = {(reader.key, reader.tensor) for space in plan.spaces for reader in space.readers}
    tensors = Counter(key for key, _ in read)
    return [_space(plan, space, tensors) for space in plan.spaces]


def _space(plan: Plan, space: Space, tensors: Counter[tuple[str, str]]) -> dict[str, Any]:
    """``tensors``: how many tensors each read joins; its time is that of all of them together."""
    original, order = np.array(space.original), np.array(space.order)
    readers = []
    for reader in space.readers:
        read = plan.reads.get(reader.key[0], {}).get(reader.key[1])
        contraction = plan.contractions.get(reader.call)
        readers.append(
            {
                "call": reader.call,
                "layer": reader.layer,
                "tensor": reader.tensor,
                "wanted": len(reader.wanted),
                "present": len(space.order if reader.present is None else reader.present),
                "slices": {"before": reader.slices(original), "after": reader.slices(order)},
                "read": "whole" if read is None else read.kind,
                "nanoseconds": 0.0 if read is None else read.nanoseconds,
                "tensors": tensors[reader.key],
                "zero_weights": 0 if contraction is None else len(contraction.blank),
            }
        )
    return {
        "name": space.name,
        "channels": {"before": space.channels, "after": len(space.order)},
        "producers": [{"call": p.call, "layer": p.layer} for p in space.producers],
        "readers": readers,
    }
