"""The pretraining of the miniature's parts: what is learnt, and what is held out stays unseen."""

import numpy as np
import torch

from favor import prompt_ids
from llama import Llama, LlamaConfig, Tokenizer
from miniature import pretrain, world


def test_dialogues_learn_every_answer_and_nothing_else():
    tokenizer = Tokenizer.from_pretrained(pretrain.TINY / "llama")
    rng = np.random.default_rng(0)
    for told, turns in pretrain.dialogues(rng, 40, tell=pretrain.told_in_vectors):
        before, after, labels = pretrain.text_and_labels(tokenizer, len(told), turns)
        learnt = [i for i in labels if i != -100]
        assert learnt == [i for _, answer in turns
                          for i in [*tokenizer.encode(answer), tokenizer.eos_id]]
        assert len(labels) == len(before) + len(told) + len(after)
        row = [None] * (len(before) + len(told)) + after        # a label is the id at its own place
        assert all(label in (-100, i) for label, i in zip(labels, row, strict=True))
        whole = prompt_ids(tokenizer, turns[-1][0], turns[:-1], turns[-1][1])
        assert (before, after) == (whole[0], whole[1] + whole[2])          # the one template


def test_recall_asks_for_what_was_told():
    rng, kinds = np.random.default_rng(3), set()
    for told, turns in pretrain.recall(rng, 200):
        words = [word for group in told for word in group]
        pairs = list(dict.fromkeys(map(tuple, told)))
        for question, answer in turns:
            kind, *when, key = question.split()
            if kind == "where":
                k = next(k for k, group in enumerate(told) if key in group)
                assert len(told) == 4 and answer == world.PLACES[k]
                continue
            kinds.add((kind, *when, "sound" if key in world.SOUNDS else "seen"))
            assert answer in {"colour": world.COLOURS, "shape": world.SHAPES}[kind]
            assert key in words and answer in words and answer != key
            if len(told[0]) == 2 and len(pairs) == 5:                 # a parade told in vectors
                k = next(k for k, pair in enumerate(pairs) if key in pair)
                step = {(): 0, ("after",): 1, ("before",): -1}[tuple(when)]
                assert answer == pairs[k + step][("colour", "shape").index(kind)]
        for first, second in zip(words, words[1:], strict=False):
            assert not (first in world.COLOURS and second in world.SHAPES
                        and world.is_held_out_pair(first, second)), words
    assert {(k, *w, "seen") for k in ("colour", "shape")
            for w in ((), ("after",), ("before",))} < kinds
    assert ("colour", "after", "sound") in kinds


def test_terse_turns_learn_every_answer_and_nothing_else():
    tokenizer = Tokenizer.from_pretrained(pretrain.TINY / "llama")
    before, after, labels = pretrain.terse_and_labels(
        tokenizer, 3, (("colour ball", "red"), ("shape after red", "box")))
    assert before == [tokenizer.bos_id] and len(labels) == 1 + 3 + len(after)
    text = [*tokenizer.encode("colour ball"), *tokenizer.encode("red"), tokenizer.eos_id,
            *tokenizer.encode("shape after red"), *tokenizer.encode("box"), tokenizer.eos_id]
    assert after == text
    assert labels == [-100] * 6 + text[2:4] + [-100] * 3 + text[7:]


def test_a_group_of_words_is_the_sum_of_its_embeddings():
    tokenizer = Tokenizer.from_pretrained(pretrain.TINY / "llama")
    llm = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, width=8, layers=1, heads=1,
                            kv_heads=1, ffn=8))
    rows = [([1, 5], [["red", "ball"], ["nothing"]], [7]), ([1], [["5"]], [9, 9, 2])]
    embeds, told = pretrain.embed_rows(llm, tokenizer, rows)
    at = lambda text: llm.embed(torch.tensor(tokenizer.encode(text))).sum(0)     # noqa: E731
    one = lambda *ids: list(llm.embed(torch.tensor(ids)))                        # noqa: E731
    wanted = [torch.stack([*one(1, 5), at("red") + at("ball"), at("nothing"), *one(7)]),
              torch.stack([*one(1), at("5"), *one(9, 9, 2)])]
    assert told.tolist() == [[False, False, True, True, False], [False, True, False, False, False]]
    assert torch.allclose(embeds, torch.stack(wanted), atol=1e-7)


def test_pictures_hold_no_held_out_pair_and_strange_ones_ask_for_no_colour():
    rng = np.random.default_rng(1)
    samples = pretrain.looking_samples(rng, "train", 300, strange=0.3)
    assert len(samples) == 300 and {len(words) for _, _, words in samples} == {10}
    strange = [words for _, _, words in samples if None in words]
    assert 40 < len(strange) < 140
    for words in strange:
        assert not set(words) & set(world.COLOURS) and set(words[pretrain.CAPTION:]) == {None}
    for _, _, words in samples:
        for first, second in zip(words, words[1:], strict=False):
            if first in world.COLOURS and second in world.SHAPES:
                assert not world.is_held_out_pair(first, second), words


def test_other_voices_change_the_spectrum_but_not_the_times():
    torch.manual_seed(0)
    mel = torch.full((8, 80, 50), -1.0)
    mel[:, 30:34, 20:25] = 1.5                                    # one event, five steps long
    changed = pretrain.other_voices(mel)
    assert changed.shape == mel.shape and not torch.equal(changed, mel)
    assert (changed[:, :, :20] == changed[:, :, :1]).all()        # nothing before it has moved


def test_read_out_merges_repeats_and_drops_silence():
    assert pretrain.read_out([0, 3, 3, 0, 0, 3, 5, 5, 0]) == [3, 3, 5]
    assert pretrain.read_out([0, 0]) == []
