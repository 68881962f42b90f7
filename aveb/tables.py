"""Answers -> tables: every metric in every view, the paper's Tables 2, 3 and 4 with our columns
beside theirs, and the report on disk.

     predictions [{id, task, prompt, references, meta, view: answer}] --table--> Markdown
                                                                      --paper_tables--> Markdown
                                       --write_report--> predictions.jsonl, .md and .json

   Public: by_task, parts_of, table, zero_shot, paper_tables, report_text, write_report."""

import dataclasses
import json

from aveb import metrics
from aveb.paper_numbers import PAPER, TABLES, TRAINED_BY
from aveb.tasks import TASKS
from runtime.hub import markdown_table, write_json, write_text

OURS = {"both": "ours", "audio only": "ours, audio only", "visual only": "ours, visual only"}


def by_task(predictions):
    """{task: its predictions}, in the order of TASKS."""
    groups = {}
    for row in predictions:
        groups.setdefault(row["task"], []).append(row)
    order = {task: i for i, task in enumerate(TASKS)}
    return dict(sorted(groups.items(), key=lambda group: order.get(group[0], len(order))))


def parts_of(rows):
    """{name: rows} of the parts that are scored apart: kinds of questions, within one window or
    across windows, NExT-QA's causal, temporal and descriptive ones."""
    if rows[0]["meta"].get("dataset") == "nextqa":
        return {f"type {kind}": part for kind, part in metrics.by_type(rows).items()}
    parts = {}
    for row in rows:
        if "type" in row["meta"]:
            parts.setdefault(row["meta"]["type"], []).append(row)
        if "one_window" in row["meta"]:
            where = "within one window" if row["meta"]["one_window"] else "across windows"
            parts.setdefault(where, []).append(row)
    return parts


def is_real(predictions):
    """Of the real benchmark, not of the miniature."""
    return any("dataset" in row["meta"] for row in predictions)


def table(predictions, views, missing=None):
    """Markdown: one row per task and metric with n, missing n, chance and the 95 % intervals, then
    the parts that are scored apart.  missing: {task: clips that could not be read}."""
    tasks, missing, lines = by_task(predictions), missing or {}, []
    for task, rows in tasks.items():
        lines += table_rows(task, rows, views, missing.get(task, 0))
    for task, rows in tasks.items():
        for part, some in sorted(parts_of(rows).items()):
            lines += table_rows(task, some, views, 0, part)
    return markdown_table(["task", "n", "missing", *views, "chance"], lines)


def table_rows(task, rows, views, missing, part=""):
    """The table's row for each metric of these predictions."""
    scores = {view: metrics.score(rows, view) for view in views}
    chances, lines = [row["meta"].get("chance") for row in rows], []
    named = is_real(rows) or len(scores[views[0]]) > 1       # one metric: its unit is enough
    for name, first in scores[views[0]].items():
        unit = name if named else {"wer_basic": "WER %", "exact": "%"}.get(name, name)
        label = (f"{task}: {part}" + (f", {name}" if named else "") if part
                 else f"**{task}** {unit} {getattr(first, 'arrow', '')}".rstrip())
        is_accuracy = name not in ("wer", "wer_basic", "answer_length")
        chance = (f"{100 * sum(chances) / len(rows):.1f}" if is_accuracy and None not in chances
                  else "-")
        lines.append([label, getattr(first, "n", 0), missing + getattr(first, "missing", len(rows)),
                      *(scores[view][name] for view in views), chance])
    return lines


# ---------------------------------------------------------------- beside the paper
def zero_shot(task, mixture):
    """Whether a model trained on `mixture` {data set: {task: samples}} has not met the task's data
    set (isqa, avm: the task).  None when it is not known what the model was trained on."""
    if mixture is None:
        return None
    if task in ("isqa", "avm"):
        return not any(task in tasks for tasks in mixture.values())
    return not any(name in mixture for name in TRAINED_BY[task])


def paper_tables(predictions, views, missing=None, mixture=None, whole=True):
    """Markdown: Tables 2, 3 and 4, one row per task and metric, one column per system, ours last.
    Rows of tasks that have not been scored are left out unless `whole`.  The zero-shot tasks of
    Table 1 are marked, and so are our own figures."""
    tasks, missing, text = by_task(predictions), missing or {}, []
    ours = [view for view in views if view in OURS]
    scores = {task: {view: metrics.score(rows, view) for view in ours}
              for task, rows in tasks.items()}
    for title, (rows, systems) in TABLES.items():
        lines = []
        for label, metric, mark in rows:
            task, tuned = label.split()[0], label.endswith("fine-tuned")
            unseen = zero_shot(task, mixture) if task in tasks else None
            here = task in tasks and (task not in ("favd", "valor") or tuned == (unseen is False))
            if here or whole:
                found = [scores[task][view].get(metric) if here else None for view in ours]
                counts = ([getattr(found[0], "n", 0), missing.get(task, 0)]
                          if here and found and found[0] is not None else ["-", "-"])
                lines.append([f"{label} {metric} {'↓' if metric == 'wer' else '↑'}"
                              + (f", {mark}" if mark else ""), *counts,
                              *(PAPER[s].get(label, {}).get(metric, "-") for s in systems),
                              *(our_cell(score, unseen) for score in found)])
        if lines:
            header = ["task (paper's mark)", "our n", "missing", *systems, *(OURS[v] for v in ours)]
            text += [title, "", markdown_table(header, lines), ""]
    return "\n".join(text).rstrip()


def our_cell(score, unseen):
    """A Score with its mark; the reason if it is Unavailable; "-" for None."""
    if score is None or score.value is None:
        return score or "-"
    mark = {None: "trained on: unknown", True: "zero-shot", False: "trained on it"}[unseen]
    return f"{score}, {mark}"


# ---------------------------------------------------------------- on disk
def report_text(predictions, views, missing, settings):
    """What is printed at the end: the table; of the real benchmark also the paper's tables."""
    text = table(predictions, views, missing)
    if is_real(predictions):
        text += "\n\n" + paper_tables(predictions, views, missing, settings.get("mixture"),
                                      settings.get("task") == "all")
    return text


def write_report(out, predictions, views, missing, settings):
    """predictions.jsonl with each answer's own score where there is one, and beside it .md (the
    tables) and .json (scores with n, missing and intervals, settings, hashes)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = {}
    for task, rows in by_task(predictions).items():
        for view in views:
            for name, score in metrics.score(rows, view).items():
                entry = str(score)
                if score.value is not None:
                    entry = dataclasses.asdict(score)
                    per_record = entry.pop("per_record")
                    for row in rows:
                        if row["id"] in per_record:
                            row.setdefault("scores", {}).setdefault(name, {})[view] = (
                                per_record[row["id"]])
                scores.setdefault(task, {}).setdefault(view, {})[name] = entry
    write_text(out, "".join(json.dumps(row) + "\n" for row in predictions))
    write_text(out.with_suffix(".md"), report_text(predictions, views, missing, settings) + "\n")
    write_json(out.with_suffix(".json"), {
        "settings": settings, "answered": len(predictions), "missing": dict(missing),
        "scores": scores, **({"zero-shot": {
            task: zero_shot(task, settings.get("mixture")) for task in scores if task in TRAINED_BY
        }} if is_real(predictions) else {})})
