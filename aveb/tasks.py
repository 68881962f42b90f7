"""The tasks of AVEB (paper Sec. 4.1, Table 1): their names, what scores them, and the views in
which a question is answered.

   Public: TASKS, METRICS, ERROR_RATES, VIEWS, HISTORIES."""

# asr speech recognition, ac audio captions, ic image captions, ocr text in images, vqa questions
# about images, videoqa about videos, avsr audio-visual speech recognition, avsd dialogues about
# videos, isqa spoken questions about images, avssd which thing makes the sound, avm whether sound
# and picture match; favd and valor: audio-visual captions (Table 4)
TASKS = ("asr", "ac", "ic", "ocr", "vqa", "videoqa", "avsr", "avsd", "isqa", "avssd", "avm",
         "favd", "valor")

# What scores a task of the real benchmark (metrics.METRICS), the paper's headline first.
METRICS = {
    "asr": ("wer", "wer_basic"), "ac": ("spider", "spice", "cider", "meteor"),
    "ic": ("cider", "meteor", "bleu4"),
    "ocr": ("textvqa_soft", "textvqa_equal", "textvqa_official", "answer_length"),
    "vqa": ("word_match", "acc_vqa", "answer_length"), "videoqa": ("choice", "choice_lenient"),
    "avsr": ("wer", "wer_basic"), "avsd": ("judged",), "isqa": ("isqa", "isqa_official"),
    "avssd": ("judged", "label_match"), "avm": ("word_match",),
    "favd": ("bleu1", "bleu4", "meteor"), "valor": ("meteor", "cider"),
    "caption": ("cider", "meteor")}

# The miniature's tasks that are scored by word error rate (less is better), the others by accuracy.
ERROR_RATES = ("asr", "ac", "avsr")

# {view of a question: the modality that is masked}
VIEWS = {"both": None, "audio only": "visual", "visual only": "audio", "blind": "both"}

# The earlier turns of a dialogue: the right answers, no turns, or the model's own answers.
HISTORIES = ("gold", "none", "model")
