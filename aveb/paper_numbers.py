"""Published numbers, for the column beside ours: Sun et al. 2023 (arXiv 2310.05863), Tables 2, 3,
9, 10 (AVEB) and 4 (FAVDBench, VALOR-32K).

PAPER[system][task] = {metric: value}, metric named as in metrics.METRICS, value x 100: word error
rates (less is better), SPIDEr, CIDEr, METEOR, BLEU, accuracies.  The authors' test subsets and
their ChatGPT judge are not public: AVSD, AVSSD and ISQA compare in protocol only.

Public: PAPER, TABLES, TRAINED_BY."""

COLUMNS = (("asr", "wer"), ("ac", "spider"), ("ic", "cider"), ("ic", "meteor"),
           ("ocr", "textvqa_soft"), ("vqa", "word_match"), ("videoqa", "choice"), ("avsr", "wer"),
           ("avsd", "judged"), ("isqa", "isqa"), ("avssd", "judged"), ("avm", "word_match"))
AVEB = """
Whisper large-v2            | 2.9  -    -    -    -    -    -    8.3  -    -    -    -
InstructBLIP 13B            | -    -    84.5 26.0 36.5 48.9 21.0 -    41.4 -    1.1  -
InstructBLIP 13B fine-tuned | -    -    78.9 26.1 36.7 45.6 24.7 -    52.1 -    20.3 -
Video-LLaMA 7B              | -    -    22.0 16.6 16.4 15.1 22.5 -    27.6 -    41.9 52.3
FAVOR 13B audio only        | 2.7  39.7 -    -    -    -    -    8.3  -    -    34.7 -
FAVOR 13B visual only       | -    -    74.0 26.5 34.2 45.6 44.8 -    53.3 -    23.5 -
FAVOR 7B                    | 4.1  39.1 78.1 26.3 34.6 45.3 42.5 8.7  51.2 24.5 50.5 74.3
FAVOR 13B                   | 3.3  42.6 86.0 27.5 37.8 45.2 49.3 8.1  54.5 32.3 51.1 77.1
no diversity loss           | 3.1  42.7 71.9 26.1 37.2 46.2 47.1 8.1  53.9 34.1 53.5 75.7
no causal encoder           | 3.0  44.0 72.1 26.0 34.9 45.7 42.8 8.0  54.1 20.9 37.1 74.8
no sliding window           | 3.3  42.7 76.8 26.4 34.6 44.8 44.8 8.5  53.6 29.7 45.3 74.5
no synchronisation          | 3.0  40.6 85.6 26.7 32.5 46.1 47.4 8.4  53.4 17.2 50.5 72.5
no causal, div, sync        | 3.1  36.0 71.9 26.0 34.7 44.8 41.8 8.9  50.5 16.7 38.6 72.0
"""
# Table 4; the table itself writes VALOR as METEOR / CIDEr.  Fine-tuned on VALOR: 10 % of its
# training clips.
CAPTION_COLUMNS = (
    ("favd", "bleu1"), ("favd", "bleu4"), ("favd", "meteor"),
    ("favd fine-tuned", "bleu1"), ("favd fine-tuned", "bleu4"), ("favd fine-tuned", "meteor"),
    ("valor", "meteor"), ("valor", "cider"),
    ("valor fine-tuned", "meteor"), ("valor fine-tuned", "cider"))
CAPTIONS = """
VALOR-base                  | -    -    -    -    -    -    -    -    14.8 55.7
Video-LLaMA 7B              | 20.8 2.4  15.0 39.4 6.5  16.5 10.7 1.2  10.9 21.3
FAVOR 7B                    | 24.9 2.8  14.8 42.6 9.9  18.3 8.6  13.4 13.9 42.6
FAVOR 13B                   | 28.2 3.0  15.2 44.2 10.9 19.1 8.8  15.3 14.2 46.9
"""
SINGLE = ("Whisper large-v2", "InstructBLIP 13B", "InstructBLIP 13B fine-tuned", "Video-LLaMA 7B",
          "FAVOR 13B audio only", "FAVOR 13B visual only", "FAVOR 7B", "FAVOR 13B")
CAPTIONING = ("VALOR-base", "Video-LLaMA 7B", "FAVOR 7B", "FAVOR 13B")
# {title: (lines (task, metric, Table 1's mark), systems)}, in the paper's order
ZERO_SHOT = ("ic", "ocr", "vqa", "isqa", "avssd", "avm", "favd", "valor")
TABLES = {
    "Table 2: single-modal tasks": (("asr", "ac", "videoqa", "ic", "ocr", "vqa"), SINGLE),
    "Table 3: audio-visual tasks": (("avsr", "avsd", "isqa", "avssd", "avm"), SINGLE),
    "Table 4: audio-visual captions": (
        ("favd", "favd fine-tuned", "valor", "valor fine-tuned"), CAPTIONING)}
TABLES = {title: (tuple((task, metric, "zero-shot" if task in ZERO_SHOT else "")
                        for name in tasks for task, metric in (*COLUMNS, *CAPTION_COLUMNS)
                        if task == name), systems)
          for title, (tasks, systems) in TABLES.items()}
# the data sets (sets.SETS) after which a task is no longer zero-shot; isqa and avm: any
# training on the task itself
TRAINED_BY = {"asr": ("librispeech",), "ac": ("audiocaps",), "ic": ("flickr30k",),
              "ocr": ("textvqa",), "vqa": ("gqa",), "videoqa": ("nextqa",), "avsr": ("how2",),
              "avsd": ("avsd",), "isqa": (), "avssd": ("vggss", "vggsound"), "avm": (),
              "favd": ("favdbench",), "valor": ("valor",)}


def _read(table, columns, systems):
    for line in table.strip().splitlines():
        system, cells = line.split("|")
        for (task, metric), cell in zip(columns, cells.split(), strict=True):
            if cell != "-":
                tasks = systems.setdefault(system.strip(), {})
                tasks.setdefault(task, {})[metric] = float(cell)
    return systems


PAPER = _read(CAPTIONS, CAPTION_COLUMNS, _read(AVEB, COLUMNS, {}))
