"""The sections of the page: which figure shows what, with its caption, alternative text and table."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from microglia.report import charts, words
from microglia.report.ablation import ablations
from microglia.report.cost import cost
from microglia.report.promise import promises
from microglia.report.section import Figure, Section
from microglia.report.sources import Entry, Findings, Run

NEAR = 0.2  # of accuracy below dense: what a reader would consider
CURVES = (  # (title, {key of the history: name}, form)
    ("Task loss", {"task": "task loss", "eval_loss": "validation"}, "{:.2f}"),
    ("Sparsity", {"keep_ratio": "sparsity", "target": "target"}, "{:.0%}"),
    ("Bytes saved", {"byte_share": "bytes saved", "target": "target"}, "{:.0%}"),
    ("Weight of mean(keep)", {"alpha": "α", "multiplier": "multiplier λ"}, "{:.2f}"),
    ("Temperature and noise of the gates", {"temperature": "temperature", "noise": "noise"}, "{:.1f}"),
)


def sections(findings: Findings) -> list[Section]:
    """Every section that has something to show."""
    parts: list[Section] = []
    for number, run in enumerate(findings.runs):
        suffix = f"-{number + 1}" if len(findings.runs) > 1 else ""
        parts.append(compared(run, suffix))
        details = [fronts(run, suffix), groups(run, suffix), heads(run, suffix)]
        parts += [replace(part, title=f"{part.title} · {run.title}") if suffix else part for part in details]
    parts += [promises(findings), *ablations(findings), training(findings), cost(findings), origin(findings)]
    return [s for s in parts if s.figures or s.rows or s.listings]


def compared(run: Run, suffix: str) -> Section:
    """Dense against pruned, one line per policy."""
    titles = ["", "right", "95 % interval", "heads pruned", "per token", "points to dense", "95 % interval", "p"]
    titles.append("answer tokens")
    rows = [
        [
            words.label(r.policy),
            words.percent(r.accuracy),
            words.interval(r.ci95),
            words.percent(r.sparsity),
            "" if r.sparsity_per_token is None else words.percent(r.sparsity_per_token),
            *words.difference(r.to_dense),
            "" if r.mean_tokens is None else f"{r.mean_tokens:.0f}",
        ]
        for r in run.entries
    ]
    used = [i for i in range(len(titles)) if i == 0 or any(row[i] for row in rows)]
    return Section(
        f"compared{suffix}",
        f"{run.title}: dense against pruned",
        words.verdict(run),
        columns=[titles[i] for i in used],
        rows=[[row[i] for i in used] for row in rows],
    )


def fronts(run: Run, suffix: str) -> Section:
    """Accuracy against sparsity, and against measured speed where every mark has one."""
    figures = []
    names = [r.policy for r in run.entries]
    dense = next((r.accuracy for r in run.entries if r.policy == "dense"), None)
    if len(run.entries) > 1:
        marks = [_mark(r, r.sparsity, None, names) for r in run.entries]
        figures += _views("Accuracy and sparsity", marks, run.entries, "heads pruned", "{:.0%}", dense)
    timed = [r for r in run.entries if r.timing]
    whole = [r for r in run.entries if r.request]
    if len(whole) > 1:
        marks = [_mark(r, r.request.ratio_to_dense, r.request.ratio_ci95, names) for r in whole if r.request]
        label = "request speed-up, dense time ÷ this time"
        figures += _views("Accuracy and the time of a request", marks, whole, label, "{:.2f}×", dense)
    if len(timed) > 1:
        marks = [_mark(r, r.timing.ratio_to_dense, r.timing.ratio_ci95, names) for r in timed if r.timing]
        label = "decode speed-up, dense time ÷ this time"
        figures += _views("Accuracy and latency", marks, timed, label, "{:.2f}×", dense)
    intro = (
        "Up and to the right is better. Whiskers are 95 % intervals; the dashed line joins the marks that no other "
        "beats in both; the dotted line is the dense model."
    )
    return Section(f"fronts{suffix}", "What accuracy costs", intro, figures)


def _views(
    title: str, marks: Sequence[charts.Point], entries: Sequence[Entry], label: str, form: str, dense: float | None
) -> list[Figure]:
    """The whole front; and the marks near the dense model once more, where others are so far below that they crowd."""
    figures = [_front(title, marks, entries, label, form, dense)]
    near = [i for i, m in enumerate(marks) if dense is not None and m.y >= dense - NEAR]
    if 3 <= len(near) < len(marks):
        close = f"{title}, near the dense model"
        figures.append(_front(close, [marks[i] for i in near], [entries[i] for i in near], label, form, dense))
    return figures


def _mark(r: Entry, x: float, x_ends: Any, names: Sequence[str]) -> charts.Point:
    ends = tuple(x_ends) if x_ends else None
    return charts.Point(words.label(r.policy), x, r.accuracy, ends, r.ci95, words.style(r.policy, names))


def _front(
    title: str,
    marks: Sequence[charts.Point],
    entries: Sequence[Entry],
    label: str,
    form: str,
    dense: float | None,
) -> Figure:
    listed = "; ".join(f"{m.name} {m.y:.1%} right at {form.format(m.x)}" for m in marks[:8])
    alt = f"{title}: accuracy upwards, {label} to the right. {listed}."
    rows = [
        [
            words.label(r.policy),
            words.percent(r.accuracy),
            words.interval(r.ci95),
            words.percent(r.sparsity),
            f"{r.request.ratio_to_dense:.3f}" if r.request else "",
            words.interval(r.request.ratio_ci95, "{:.3f}", 1) if r.request else "",
            f"{r.timing.ms_per_token:.2f}" if r.timing else "",
            f"{r.timing.ratio_to_dense:.3f}" if r.timing else "",
            words.interval(r.timing.ratio_ci95, "{:.3f}", 1) if r.timing else "",
        ]
        for r in entries
    ]
    titles = ["", "right", "95 %", "heads pruned", "request", "95 %", "ms/token", "speed-up", "95 %"]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    legend = list(dict.fromkeys((m.style, "random masks" if m.style == 3 else m.name) for m in marks))
    svg = charts.front(marks, alt, label, form, dense=dense)
    return Figure(title, svg, [titles[i] for i in used], [[row[i] for i in used] for row in rows], legend=legend)


def groups(run: Run, suffix: str) -> Section:
    """Sparsity by difficulty and by family; accuracy beside it."""
    pruned = _agents(run)
    figures = []
    for kind, label in (("difficulty", "steps of the worked answer"), ("family", "")):
        for value in ("sparsity", "accuracy"):
            key = f"{value}_by_{kind}"
            shown = [r for r in run.entries if (r is pruned or (value == "accuracy" and r.policy == "dense"))]
            series = {words.label(r.policy): (words.STYLES.get(r.policy, 1), r.by[key]) for r in shown if r.by.get(key)}
            if not series:
                continue
            title = {"sparsity": "Heads pruned", "accuracy": "Right answers"}[value] + f" by {kind}"
            figures.append(_grouped(title, series, label, sideways=kind == "family"))
    return Section(
        f"groups{suffix}",
        "Does effort follow the problem?",
        "If the agents adapt, easy problems lose more heads than hard ones. " + words.follows(run),
        figures,
    )


def _grouped(title: str, series: dict[str, tuple[int, dict[str, float]]], label: str, *, sideways: bool) -> Figure:
    names = list(dict.fromkeys(group for _, values in series.values() for group in values))
    first = next(iter(series.values()))[1]
    listed = ", ".join(f"{group}: {value:.1%}" for group, value in first.items())
    rows = [[group, *(words.percent(values.get(group)) for _, values in series.values())] for group in names]
    svg = charts.columns(series, f"{title}. {listed}.", label, sideways=sideways)
    legend = [(number, name) for name, (number, _) in series.items()] if len(series) > 1 else []
    return Figure(title, svg, ["", *series], rows, legend=legend)


def heads(run: Run, suffix: str) -> Section:
    """Site × unit: how often kept; and of heads the two signals."""
    pruned = _agents(run)
    kinds = {unit: pruned.heads.get(name) for unit, name in words.KEPT.items()} if pruned is not None else {}
    if pruned is None or not any(kinds.values()):
        return Section(f"heads{suffix}", "")
    figures = [_kept(kept, unit) for unit, kept in kinds.items() if kept]
    if entropy := pruned.heads.get("entropy"):
        most = max(max(row) for row in entropy)
        alt = f"Attention entropy per head, site by head; the highest is {most:.2f}."
        svg = charts.heat(entropy, alt, entropy, "entropy {:.3f}", ends=("one key", "all keys"))
        note = "Mean over prompts; 0: a head looks at one token, 1: at all visible tokens alike."
        figures.append(Figure("Attention entropy", svg, *_matrix(entropy, "{:.3f}"), note))
    if norm := pruned.heads.get("norm"):
        shade = [[value / (max(row) or 1) for value in row] for row in norm]
        alt = "Activation norm per head, site by head, shaded relative to the largest of its site."
        svg = charts.heat(norm, alt, shade, "norm {:.4g}", ends=("0", "site's largest"))
        note = "Mean over prompts of the norm of a head's output; shaded relative to the largest of its site."
        figures.append(Figure("Activation norm", svg, *_matrix(norm, "{:.4g}"), note))
    intro = f"What {words.label(pruned.policy)} decided on {pruned.prompts:,} prompts, and the signals it decided from."
    what = "heads" if [*filter(kinds.get, kinds)] == ["head"] else "units"
    return Section(f"heads{suffix}", f"Which {what} stay", intro, figures, narrow=True)


def _kept(kept: Sequence[Sequence[float]], unit: str) -> Figure:
    """Site × unit: how often each is kept."""
    often = [value for row in kept for value in row]
    always, never = sum(v == 1 for v in often), sum(v == 0 for v in often)
    summary = f"Of {len(often)} {unit}s {always} are kept for every prompt and {never} for none."
    alt = f"How often each {unit} is kept, site by {unit}. {summary}"
    form = "kept for {:.1%} of the prompts"
    svg = charts.heat(kept, alt, kept, form, row_means=True, ends=("never", "always"), unit=unit)
    note = summary + " At the right: the site's mean."
    return Figure(f"How often each {unit} is kept", svg, *_matrix(kept, "{:.1%}", unit), note)


def _matrix(values: Sequence[Sequence[float]], form: str, unit: str = "head") -> tuple[list[str], list[list[str]]]:
    titles = ["site", *(f"{unit} {number}" for number in range(max(map(len, values))))]
    return titles, [[str(site), *(form.format(value) for value in row)] for site, row in enumerate(values)]


def _agents(run: Run) -> Entry | None:
    """The entry of the agents, or of whatever else pruned in this run."""
    return next((r for r in run.entries if r.policy in words.PRUNED), run.entries[1] if run.entries[1:] else None)


def training(findings: Findings) -> Section:
    """Task loss, sparsity, what steers it, and the gates' temperature over the steps."""
    figures = []
    for name, history in findings.histories.items():
        for title, keys, form in CURVES:
            series = dict(_curves(history, keys))
            if not series:
                continue
            last = "; ".join(f"{key} ends at {form.format(pairs[-1][1])}" for key, (_, pairs) in series.items())
            where = f" ({name})" if len(findings.histories) > 1 else ""
            steps = sorted({step for _, pairs in series.values() for step, _ in pairs})
            table = {key: dict(pairs) for key, (_, pairs) in series.items()}
            rows = [
                [f"{step:g}", *(f"{values[step]:.4g}" if step in values else "" for values in table.values())]
                for step in steps
            ]
            top = (
                (0.0, 1.05 * max(v for _, pairs in series.values() for _, v in pairs) or 1.0)
                if title != "Task loss"
                else None
            )
            svg = charts.lines(series, f"{title} over training steps; {last}.", form, y_range=top)
            legend = [(8 if number >= 8 else -1, key) for key, (number, _) in series.items()]
            figures.append(Figure(title + where, svg, ["step", *series], rows, legend=legend))
    return Section("training", "How the agents were trained", "Values are means since the line before.", figures)


def _curves(
    history: Sequence[dict[str, Any]], keys: dict[str, str]
) -> Iterator[tuple[str, tuple[int, list[tuple[float, float]]]]]:
    drawn, steered = 0, "byte_share" if any("byte_share" in row for row in history) else "keep_ratio"
    for key, name in keys.items():
        if key == "target" and steered not in keys:
            continue  # it belongs to the other chart
        pairs = [(row["step"], row[key]) for row in history if isinstance(row.get(key), int | float)]
        if key in ("keep_ratio", "byte_share", "target"):
            pairs = [(step, 1 - value) for step, value in pairs]
        if len(pairs) > 1:
            yield name, (8 if drawn else 1, pairs)
            drawn += 1


def origin(findings: Findings) -> Section:
    """Devices, versions, commits, commands and settings."""
    rows = [
        [
            made.device,
            ", ".join(f"{name} {version}" for name, version in made.versions.items()),
            (made.commit or "")[:12],
        ]
        for made in findings.circumstances
    ]
    listings = [("Commands", "\n".join(dict.fromkeys(m.command for m in findings.circumstances if m.command)))]
    for name, config in findings.checkpoints.items():
        options = config.get("training", {}).get("config") or {}
        settings = [f"base model: {config['base_model']}", *(f"{key}: {value}" for key, value in options.items())]
        listings.append((f"Settings of {name}", "\n".join(settings)))
    listings += [
        ("Agents", f"{demo.agent_parameters:,} parameters, {demo.agent_share:.3%} of the model")
        for demo in findings.demos[-1:]
    ]
    unique = list(dict.fromkeys(map(tuple, rows)))
    return Section(
        "origin",
        "Where these figures come from",
        columns=["device", "versions", "commit"] if rows else [],
        rows=unique,
        listings=[listing for listing in listings if listing[1]],
    )
