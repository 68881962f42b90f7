"""A few damaged files of each kind, as tests/fuzz.py opens thousands by hand."""

import fuzz


def test_damaged_files_end_in_a_sentence():
    counts, bad, _ = fuzz.run(media=46, checkpoints=16, seed=1)
    assert not bad
    assert counts["media"].total() == 46 and counts["media"]["skipped"]
    assert counts["checkpoint"].total() == 16 and counts["checkpoint"]["refused"]
