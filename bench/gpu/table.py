"""What is printed last: every decode step beside its ceiling, prompts, training, the cells' times, and the bars."""

from collections.abc import Iterator, Mapping, Sequence

from bench.gpu.bars import Row, bars, decoded


def printed(rows: Sequence[Row], lines: Sequence[str] = ()) -> str:
    """All that the records hold, and the lines that a run has said."""
    parts: list[str] = []
    for (shape, layers, batch, context), variants in decoded(rows).items():
        parts.append(f"{shape}, {layers} layers, {batch} × {context}")
        parts += _steps(variants)
    parts += [_prompt(row) for row in rows if row["name"] == "gpu_looking"]
    parts += [_training(row) for row in rows if row["name"] == "gpu_training_step"]
    spent = [f"{row['extra']['cell']} {row['value']:.0f}" for row in rows if row["name"] == "gpu_cell"]
    parts += [f"cells, in seconds: {', '.join(spent)}"] if spent else []
    return "\n".join([*parts, *lines, *(str(bar) for bar in bars(rows))])


def _steps(variants: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """A line for every variant and way; gains are over the dense step of the same way."""
    for name, ways in variants.items():
        for row in ways:
            extra = row["extra"]
            line = f"  {name:<20}{row['value']:>9.3f} ms"
            if extra.get("roof_ms"):
                line += f"   bytes {extra['roof_ms']:>7.3f}"
            if extra.get("switch_ms") is not None:
                share = "" if extra["realised_share"] is None else f"{extra['realised_share']:.0%}"
                line += f"   ×{extra['ratio_to_dense']:.3f} of ×{extra['ceiling']:.3f} {share:>6}"
                line += f"   switch {extra['switch_ms']:.2f} ms"
            if extra.get("apart") is not None:
                line += f"   apart {extra['apart']:.1g}"
            if extra.get("first_s"):
                line += f"   first {extra['first_s']:.1f} s"
            tried = ", ".join(f"{way} {ms:.2f}" for way, ms in extra.get("ways_ms", {}).items())
            yield f"{line}   {extra.get('way', '')}   {tried}".rstrip()


def _prompt(row: Row) -> str:
    extra = row["extra"]
    low, high = extra["ci95"]
    norms = f"norms and deciding add {extra['norms_and_deciding']:+.1%}, " if "norms_and_deciding" in extra else ""
    return (
        f"{extra['shape']}, {extra['layers']} layers: a prompt of {extra['tokens']} tokens takes "
        f"{extra['dense_ms']:.2f} ms; {norms}entropies {row['value']:+.1%} [{low:+.1%}, {high:+.1%}], "
        f"all looking and deciding {extra['looking_and_deciding']:+.1%}; the two ways to an entropy differ by at most "
        f"{extra['differs']:.5f}"
    )


def _training(row: Row) -> str:
    extra = row["extra"]
    peak = "" if extra["peak_gib"] is None else f", {extra['peak_gib']:.1f} GiB at most"
    return (
        f"{extra['shape']}, {extra['layers']} layers: a training step of {extra['batch']} × {extra['tokens']} tokens "
        f"takes {row['value']:.0f} ms{peak}"
    )
