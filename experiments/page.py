"""The text of docs/ablations.md. Its tables and the numbers in its sentences come from
results.jsonl, so that prose and numbers cannot diverge.

     Results --page--> Markdown: what was run, verdicts, reasons, figures, scores
What the sentences conclude was written for the committed results. Read them again when new results
are published: numbers follow by themselves, conclusions do not.

Public: page, synchronisation_table, verdict_table."""

import re
import textwrap

from aveb.metrics import ERROR_RATES
from experiments.tables import (
    CLAIMS,
    SYSTEMS,
    claim_table,
    mean_interval,
    paired,
    score_table,
    verdict,
)
from miniature import scenes
from runtime.hub import markdown_table

VERDICTS = ("same sign and significant", "same sign", "not reproduced", "opposite and significant")
SIMULTANEOUS = (("avsd", ""), ("avsd", "at"), ("avsd", "after"), ("avssd", ""), ("avm", ""),
                ("avm", "video"), ("avm", "image"), ("avsr", ""), ("ic", ""), ("ocr", ""),
                ("vqa", ""), ("videoqa", ""))
COSINE_TASKS = ("avsr", "videoqa", "avssd")


# ---------------------------------------------------------------- numbers inside sentences
def mean(stage, system, task, part=""):
    """'20.0': the mean over seeds."""
    return f"{mean_interval([*stage.by_seed(system, task, part).values()])[0]:.1f}"


def span(stage, system, task, part=""):
    """'45 to 99': the lowest and the highest seed; '100' if they are equal."""
    values = stage.by_seed(system, task, part).values()
    return " to ".join(dict.fromkeys((f"{min(values):.0f}", f"{max(values):.0f}")))


def change(stage, system, task, part="", base="complete"):
    """'-24.2 ± 21.8*': the difference to another system, paired by seed."""
    return str(stage.against(system, task, part, base))


def changes(results, system, task, part="", base="complete"):
    """The same at every stage: '-24.2 ± 21.8* after 1100 steps, ... and ... after 4400'."""
    parts = [f"{change(stage, system, task, part, base)} after {stage.step}"
             for stage in results.stages]
    parts[0] += " steps"
    return listed(parts)


def listed(words):
    """'a, b and c'; 'none' for no words."""
    *most, last = [*words] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def significant(stage, system, worse=True):
    """The tasks in which a system is worse (or better) than `complete` outside the interval."""
    found = []
    for task in scenes.TASKS:
        difference = stage.against(system, task)
        if difference and difference.significant and (
                (difference.mean > 0) == (worse == (task in ERROR_RATES))):
            found.append(task)
    return found


def gains(stage, system):
    """The tasks in which the last half of the steps changed a system outside the interval."""
    before = stage.half
    found = {task: paired(stage.by_seed(system, task), before.by_seed(system, task))
             for task in scenes.TASKS}
    return [task for task, difference in found.items() if difference and difference.significant]


def mask_differences(stage):
    """'avsr -1.8 ± 1.0*': the tasks and parts in which the future-looking mask differs from the
    past-looking one outside the interval; and how many were compared."""
    keys = sorted({(t, p) for s, t, p in stage.scores if s == "future" and p != "query cosine"})
    found = [(" ".join(filter(None, key)), stage.against("future", *key)) for key in keys]
    return [f"{name} {difference}" for name, difference in found if difference.significant], len(
        keys)


def cosine_gap(stage):
    """'0.05 to 0.08': how much lower the queries' cosine is with the diversity loss."""
    gaps = [-paired(stage.by_seed("complete", task, "query cosine"),
                    stage.by_seed("no-diversity", task, "query cosine")).mean
            for task in COSINE_TASKS]
    return f"{min(gaps):.2f} to {max(gaps):.2f}"


# ---------------------------------------------------------------- tables
def synchronisation_table(stage):
    """With and without Eq. (1), with the scores of each seed."""
    def cell(values):
        return f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"

    lines, seeds = [], []
    for task, part in SIMULTANEOUS:
        ours, without = (stage.by_seed(s, task, part) for s in ("complete", "no-sync"))
        seeds = sorted({*ours} & {*without})
        lines.append([task + (f": {part}" if part else "") + " WER ↓" * (task in ERROR_RATES),
                      cell([ours[seed] for seed in seeds]),
                      cell([without[seed] for seed in seeds]),
                      stage.against("no-sync", task, part)])
    return markdown_table(["task", f"with (seeds {', '.join(map(str, seeds))})", "without",
                           "difference"], lines)


def verdict_table(results):
    """How many of the paper's claims have which verdict at every stage."""
    lines = []
    for stage in results.stages:
        found = {name: [] for name in VERDICTS}
        for system, tasks in CLAIMS:
            for task in tasks:
                found[verdict(stage.against(system, task), task in ERROR_RATES)].append(
                    f"{task} {SYSTEMS[system][0]}")
        opposite = found[VERDICTS[-1]]
        lines.append([f"{stage.step} steps", *(len(found[name]) for name in VERDICTS[:-1]),
                      f"{len(opposite)}" + (f": {'; '.join(opposite)}" if opposite else "")])
    return markdown_table(["after", *VERDICTS], lines)


# ---------------------------------------------------------------- the page
def page(results):
    """All of docs/ablations.md."""
    sections = [introduction(results), in_short(results), synchronisation(results),
                windows(results), causal_encoder(results), diversity(results),
                modalities(results), figures(results), scores(results), reproducibility()]
    return "\n\n".join(wrapped(section) for section in sections) + "\n"


def wrapped(section):
    """Paragraphs at 120 columns; headings, tables, pictures and code stay as they are."""
    blocks = []
    for block in re.split(r"\n\n+", textwrap.dedent(section).strip()):
        if not block.startswith(("#", "|", "!", "```")):
            block = textwrap.fill(" ".join(block.split()), 120, break_long_words=False,
                                  break_on_hyphens=False)
        blocks.append(block)
    return "\n\n".join(blocks)


def introduction(results):
    """What was run, and how to run it again."""
    first, seeds = results.first, len(results.first.by_seed("complete", "avsd"))
    n = first.rows[0]["n"]
    steps = listed([str(stage.step) for stage in results.stages])
    return f"""# The ablations in miniature

<!-- experiments/publish.py writes this page. To change its text, edit experiments/page.py. -->

The paper removes one part of the method at a time and trains again (its Tables 2, 3, 5, 9 and 10,
Figs 3 to 5). This page does the same on the generated miniature benchmark: {len(SYSTEMS)} systems
with {seeds} seeds each, scored on {n} questions per task after {first.half.step}, {steps} steps of
32 samples. Four systems, which only the figures show, stop after the first {first.step} steps.

```sh
python -m experiments.ablate                 # two stages: {first.step} and {2 * first.step} steps
python -m experiments.ablate --quick         # few systems, one seed, 160 steps: about 8 minutes
python -m experiments.ablate --only complete no-sync --stages 3           # {4 * first.step} steps
python -m experiments.publish runs/ablate    # takes these runs over and writes this page
```

The first command uses all cores or GPUs, and the same command continues an interrupted run. It
writes results.jsonl, tables, figures (extra `plot`) and a comparison with the committed results.

All numbers are from [ablate/results.jsonl](ablate/results.jsonl);
[ablate/results.md](ablate/results.md) has all differences. Scores are means over seeds in percent:
word error rates for asr, ac and avsr (↓), right answers for the other tasks (↑). A ± gives half of
the 95 % t-interval. Differences are to the complete system and paired by seed; a * marks an
interval that excludes zero, and we call such a difference significant.
{sum(len(t) for _, t in CLAIMS)} claims are tested without a correction for multiple tests, so a
single star decides little."""


def in_short(results):
    """The verdicts."""
    first, last = results.first, results.stages[-1]
    better = [f'"{SYSTEMS[s][0]}"' for s in last.systems
              if "avsr" in significant(last, s, worse=False)]
    return f"""## In short

In {sum(len(tasks) for _, tasks in CLAIMS)} cases the paper's score gets worse
when a part is removed or changed. So many of them appear here:

{verdict_table(results)}

Here a part mostly affects how soon something is learnt. Synchronisation matters most:
without it, avsd falls from {mean(first, "complete", "avsd")} to {mean(first, "no-sync", "avsd")} %
after {first.step} steps. Sliding windows help videoqa at every stage. The causal encoder and the
direction of its mask make no difference that these seeds can show, except for isqa. The diversity
loss does little at λ = 0.01 and harm at λ = 10. Training on both modalities costs the tasks of one
modality nothing, and tasks that need both are at chance with one.

The next table has the paper's numbers and ours. Each cell gives the scores of the complete and of
the reduced system, their difference, an exact p-value (five seeds cannot go below 0.062) and the
verdict.

{claim_table(results)}

![Table 5's tasks against the steps of training, with and without each part](ablate/learning.png)

Not everything has converged. From {last.half.step} to {last.step} steps the complete system still
changes significantly in {listed(gains(last, "complete"))}. isqa is learnt late by all systems, so
a verdict on isqa is one on the speed of learning. In avsr the complete system, at
{mean(last, "complete", "avsr")} % after {last.step} steps, is significantly worse than
{listed(better)}; the verdicts on avsr at that stage deserve caution, as its five runs are the
reference of all of them."""


def synchronisation(results):
    """Eq. (1)."""
    first, second, last = results.stages
    half = first.half
    return f"""## Synchronisation

Without Eq. (1) each modality goes through the causal Q-Former on its own, and the outputs are
concatenated. The LLM gets twice as many vectors, but no longer learns from them what happened at
the same time. After {first.step} steps:

{synchronisation_table(first)}

With synchronisation, what is seen and heard at the same time is in one vector. Without it, nothing
marks which vectors belong together. So the colour at a sound (avsd "at") falls to a guess among
the colours shown, the lamp that sounds (avssd) to a guess among four, and flash against sound
(avm: video) to a coin toss. avsr falls most of the way to what the sound alone gives
({mean(first, "audio-only", "avsr")} % wrong).

Tasks that pair nothing in time do not suffer. isqa, a question spoken over a still image, even
changes by {changes(results, "no-sync", "isqa")}, and avm with still images by
{changes(results, "no-sync", "avm", "image")}; the larger number of vectors may help there.

With longer training the LLM finds out by itself what belongs together, some seeds sooner than
others. After {last.step} steps the seeds without Eq. (1) reach
{span(last, "no-sync", "avsd", "at")} % in avsd "at" and {span(last, "no-sync", "avm", "video")} %
in avm with videos; with it all reach {span(last, "complete", "avsd", "at")} and
{span(last, "complete", "avm", "video")} %. What remains are {change(last, "no-sync", "avsd")}
points of avsd and {change(last, "no-sync", "avsr")} of avsr's words; avssd is level
({change(last, "no-sync", "avssd")}). In avsd "at" and avm with videos synchronisation is worth
more than four times the training: {mean(second, "no-sync", "avsd", "at")} and
{mean(second, "no-sync", "avm", "video")} % without it after {second.step} steps, against
{mean(half, "complete", "avsd", "at")} and {mean(half, "complete", "avm", "video")} % with it after
{half.step}."""


def windows(results):
    """Sliding windows."""
    last = results.stages[-1]
    return f"""## Sliding windows

One window over the whole clip changes videoqa by {changes(results, "no-windows", "videoqa")}, and
avsd by {changes(results, "no-windows", "avsd")}. The reason, as we read it: with windows the first
ten vectors are the first 2.5 s whatever they hold, and the LLM's positions tell before from after.
The queries of one long window must first learn to divide the time among themselves. Some seeds
have learnt that by {results.first.step} steps and others have not, hence the wide intervals.

One window also gives half as many LLM vectors. With twice the queries in the one window, their
number is equal again. Against the one window with fewer queries, that changes videoqa by
{changes(results, "no-windows-2q", "videoqa", base="no-windows")}. After {last.step} steps, one
window with twice the queries is significantly worse than windows in
{listed(significant(last, "no-windows-2q"))}, and better in
{listed(significant(last, "no-windows-2q", worse=False))}. So what is left of the loss in videoqa
may be the number of vectors; what is left in ac is not."""


def causal_encoder(results):
    """The causal encoder and the direction of its mask."""
    masks = [(stage.step, *mask_differences(stage)) for stage in results.stages]
    found = listed([f"{listed(names)} after {step}" for step, names, _ in masks])
    return f"""## The causal encoder

None of the paper's three losses appears without the causal encoder. videoqa changes by
{changes(results, "no-causal", "videoqa")}; avssd by {changes(results, "no-causal", "avssd")}; isqa
by {changes(results, "no-causal", "isqa")}. As we read it, the joint vectors have learnt positions,
so the order is known without a causal mask, and 300 000 parameters fewer may be learnt sooner.

The released code lets a frame attend to later frames, the paper to earlier ones. Of {masks[0][2]}
tasks and parts of tasks, the difference (future minus past) is significant for {found} steps. By
chance alone {0.05 * sum(n for _, _, n in masks):.0f} of all {sum(n for _, _, n in masks)} would
be, so these seeds show no difference."""


def diversity(results):
    """The diversity loss."""
    first, second, last = results.stages
    return f"""## The diversity loss

At λ = 0.01 the loss keeps the queries a little further apart: their mean cosine is lower than with
λ = 0 by {cosine_gap(first)} (three tasks) after {first.step} steps and by {cosine_gap(last)} after
{last.step}. That is worth little: without it, ocr changes by
{changes(results, "no-diversity", "ocr")}, and ic by {changes(results, "no-diversity", "ic")}.

At λ = 10 the loss outweighs the answers. It makes {listed(significant(first, "lambda-10"))}
significantly worse after {first.step} steps, and {listed(significant(last, "lambda-10"))} after
{last.step}. At λ = 1 it does so with {listed(significant(first, "lambda-1"))} after {first.step}
steps, at λ = 0.1 with {listed(significant(first, "lambda-0.1"))}."""


def modalities(results):
    """One modality only."""
    first, second, last = results.stages
    return f"""## One modality

"audio only" and "visual only" hide the other modality in training and in the test (the paper's
Tables 2 and 3). As in the paper, learning both costs the tasks of one modality little or nothing.
After {second.step} steps, sound alone changes asr by {change(second, "audio-only", "asr")} and ac
by {change(second, "audio-only", "ac")}; the picture alone changes ic by
{change(second, "visual-only", "ic")}, ocr by {change(second, "visual-only", "ocr")}, vqa by
{change(second, "visual-only", "vqa")} and videoqa by {change(second, "visual-only", "videoqa")}.
Tasks that need both are at a guess with one: avssd is at {mean(second, "audio-only", "avssd")} %
by sound, {mean(second, "visual-only", "avssd")} % by the picture and
{mean(second, "complete", "avssd")} % with both; avsd at {mean(second, "audio-only", "avsd")},
{mean(second, "visual-only", "avsd")} and {mean(second, "complete", "avsd")} %. Each modality holds
part of avsr: {mean(second, "audio-only", "avsr")} % of the words are wrong by sound,
{mean(second, "visual-only", "avsr")} % by the lips and {mean(second, "complete", "avsr")} % with
both."""


def figures(results):
    """The paper's Figs 3, 4 and 5, and where the queries look."""
    first = results.first
    return f"""## The paper's figures

All figures show the state after {first.step} steps. Dots are seeds, bars are 95 % t-intervals.

![asr and videoqa against the window size, videoqa against the frame rate](ablate/fig3.png)

Fig. 3: (a) as in the paper, short windows help speech: asr falls from
{mean(first, "no-windows-2q", "asr")} % wrong with one window to {mean(first, "k1", "asr")} % with
one window per frame. (b) The paper's videoqa suffers from short windows, but ours gains, from
{mean(first, "no-windows-2q", "videoqa")} to {mean(first, "k1", "videoqa")} %. Our silent videos
show one object after the other, so nothing in them needs a longer window. Stills pay for it, as
they are one frame and get only two vectors: ic is at {mean(first, "k1", "ic")} % and ocr at
{mean(first, "k1", "ocr")} %. (c) The frame rate of training, 2 Hz, is best: videoqa is at
{mean(first, "complete", "videoqa", "at 0.5 Hz")}, {mean(first, "complete", "videoqa", "at 1 Hz")},
{mean(first, "complete", "videoqa", "at 2 Hz")} and {mean(first, "complete", "videoqa", "at 4 Hz")}
% at 0.5, 1, 2 and 4 Hz.

![avsr, videoqa, avssd and the queries' cosine against lambda](ablate/fig4.png)

![cosine matrices of the queries](ablate/fig5.png)

Fig. 4 and Fig. 5 (seed 0): as in the paper, too large a λ hurts. It makes the queries unlike each
other whatever the clip holds: the same pairs are opposed in all three tasks.

![cross-attention of each query over frames and sound](ablate/attention-complete.png)

Where the queries of the complete system look (seed 0): they have divided the time among
themselves. In this clip the first ones read the first frame of each window and the last ones its
last frame.

The same picture for [no synchronisation](ablate/attention-no-sync.png) and the [mask turned to the
future](ablate/attention-future.png)."""


def scores(results):
    """All scores, and where they were made."""
    commits = listed(sorted({row["commit"][:7] for row in results.rows}))
    tables = "\n\n".join(map(score_table, results.stages))
    return f"""## All scores

{tables}

Two shared EPYC cores (Zen 3), commits {commits}: 6 to 11 minutes per run of {results.first.step}
steps and core, about eight and a half hours for all 130 runs of the first command, about 4 GB of
disk."""


def reproducibility():
    """How far the same command gives the same numbers."""
    return """## Reproducibility

On the same kind of processor the same command gives the same rows to the last digit (2377 of 2377
rows of a second run). On another kind the differences are of the size of the intervals: of three
systems trained again with all seeds on two Xeon cores (Sapphire Rapids), 94 of 99 means lie inside
the intervals above, and 7 of 8 verdicts are the same. Verdicts near the edge of an interval can
change. At its end `experiments.ablate` prints this comparison for your run."""
