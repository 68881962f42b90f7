"""The pretraining of the miniature's parts: what is learnt, and what is held out stays unseen."""

import numpy as np
import torch

import miniature as world
import miniature_pretrain as pretrain
from favor import prompt_ids
from llama import Tokenizer


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
                assert not world._held_out_pair(first, second), words


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
