"""Answers -> tables: every metric in every view, the paper's Tables 2, 3 and 4 with our columns
beside theirs, and the report on disk.

     predictions [{id, task, prompt, references, meta, view: answer}] --table--> Markdown
                                                                      --paper_tables--> Markdown
                                       --write_report--> predictions.jsonl, .md and .json

Public: TASKS, by_task, scores_of, table, zero_shot, paper_tables, write_report, write_text."""

import dataclasses
import json

import miniature
from aveb import metrics
from aveb.paper_numbers import PAPER, TABLES, TRAINED_BY
from runtime import hub

TASKS = (*miniature.TASKS, "favd", "valor")      # Tables 2 and 3; Table 4
OURS = {"both": "ours", "audio only": "ours, audio only", "visual only": "ours, visual only"}


def by_task(predictions):
    """{task: its predictions}, in the order of TASKS."""
    groups = {}
    for row in predictions:
        groups.setdefault(row["task"], []).append(row)
    order = {task: i for i, task in enumerate(TASKS)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


def scores_of(rows, view):
    """{metric: Score or Unavailable} of the rows of a task."""
    return metrics.measure([
        {"options": [], **row, "answer": row[view], "verdict": row.get("verdicts", {}).get(view)}
        for row in rows])


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
    """Markdown: a line a task and metric with n, missing n, chance and the 95 % intervals; then the
    parts scored apart.  missing: {task: clips that could not be read}."""
    tasks, missing = by_task(predictions), missing or {}
    lines = ["| task | n | missing | " + " | ".join(views) + " | chance |",
             "|---" * (len(views) + 4) + "|"]
    for task, rows in tasks.items():
        lines += table_lines(task, rows, views, missing.get(task, 0))
    for task, rows in tasks.items():
        for kind, part in sorted(parts_of(rows).items()):
            lines += table_lines(task, part, views, 0, kind)
    return "\n".join(lines)


def table_lines(task, rows, views, missing, part=""):
    """A line for each metric of the rows."""
    by_view, lines = [scores_of(rows, view) for view in views], []
    chances = [row["meta"].get("chance") for row in rows]
    for name, first in by_view[0].items():
        unit = {"wer_basic": "WER %", "exact": "%"}.get(name, name) if not is_real(rows) else name
        label = (f"{task}: {part}" + (f", {name}" if is_real(rows) else "") if part
                 else f"**{task}** {unit} {getattr(first, 'arrow', '')}".rstrip())
        accuracy = name not in ("wer", "wer_basic", "answer_length")
        chance = (f"{100 * sum(chances) / len(rows):.1f}" if accuracy and None not in chances
                  else "-")
        n, lost = getattr(first, "n", 0), missing + getattr(first, "missing", len(rows))
        cells = [str(scores[name]) for scores in by_view]
        lines.append(f"| {label} | {n} | {lost} | " + " | ".join(cells) + f" | {chance} |")
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
    """Markdown: Tables 2, 3 and 4, a line a task and metric, a column a system, ours last.  Lines
    of tasks that have not been scored are left out unless `whole`.  A task of Table 1's zero-shot
    ones is marked so, and so are our own figures."""
    tasks, missing = by_task(predictions), missing or {}
    ours = [view for view in views if view in OURS]
    scores = {task: {view: scores_of(rows, view) for view in ours}
              for task, rows in tasks.items()}
    text = []
    for title, (rows, systems) in TABLES.items():
        lines = []
        for label, metric, mark in rows:
            task, tuned = label.split()[0], label.endswith("fine-tuned")
            unseen = zero_shot(task, mixture) if task in tasks else None
            here = task in tasks and (task not in ("favd", "valor") or tuned == (unseen is False))
            if not here and not whole:
                continue
            known = {None: "trained on: unknown", True: "zero-shot", False: "trained on it"}[unseen]
            found = [scores[task][view].get(metric) if here else None for view in ours]
            counts = (f"{getattr(found[0], 'n', 0)} | {missing.get(task, 0)}"
                      if here and found and found[0] is not None else "- | -")
            cells = [str(PAPER[s].get(label, {}).get(metric, "-")) for s in systems]
            cells += [f"{score}, {known}" if score is not None and score.value is not None
                      else str(score or "-") for score in found]
            arrow = "↓" if metric == "wer" else "↑"
            lines.append(f"| {label} {metric} {arrow}{', ' + mark if mark else ''} | {counts} | "
                         + " | ".join(cells) + " |")
        if lines:
            head = ["task (paper's mark)", "our n", "missing", *systems, *(OURS[v] for v in ours)]
            text += [f"{title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                     *lines, ""]
    return "\n".join(text).rstrip()


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
            for name, score in scores_of(rows, view).items():
                told = str(score)
                if score.value is not None:
                    told = dataclasses.asdict(score)
                    items = told.pop("items")
                    for row in rows:
                        if row["id"] in items:
                            row.setdefault("scores", {}).setdefault(name, {})[view] = (
                                items[row["id"]])
                scores.setdefault(task, {}).setdefault(view, {})[name] = told
    write_text(out, "".join(json.dumps(row) + "\n" for row in predictions))
    write_text(out.with_suffix(".md"), report_text(predictions, views, missing, settings) + "\n")
    hub.write_json(out.with_suffix(".json"), {
        "settings": settings, "answered": len(predictions), "missing": dict(missing),
        "scores": scores, **({"zero-shot": {
            task: zero_shot(task, settings.get("mixture")) for task in scores if task in TRAINED_BY
        }} if is_real(predictions) else {})})


def write_text(path, text):
    """Atomically: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
