"""Where values are kept: cheap places, within the bytes allowed, with fewer samples only if nothing else helps."""

from featherweight.recover.cuts import plan_cuts

MIB = 1 << 20


def test_cuts_lie_where_little_must_be_kept():
    cuts, samples, note = plan_cuts([MIB, 900 * MIB, 900 * MIB, MIB, 900 * MIB, 900 * MIB], 10, 10, 1000 * MIB)
    assert cuts == [0, 3, 6]
    assert (samples, note) == (10, "")


def test_every_layer_is_a_cut_where_keeping_is_free():
    assert plan_cuts([0.0] * 4, 1, 1, MIB)[0] == [0, 1, 2, 3, 4]


def test_a_cut_too_large_is_not_taken():
    cuts, _, _ = plan_cuts([1.0, 2.0 * MIB, 1.0], 1, 1, MIB)
    assert 1 not in cuts


def test_too_many_samples_are_halved_until_they_fit():
    cuts, samples, note = plan_cuts([MIB, MIB], 8, 1024, 16 * MIB)
    assert samples == 128
    assert cuts[0] == 0
    assert "128 of 1024 samples" in note


def test_a_few_samples_are_always_taken():
    assert plan_cuts([MIB, MIB], 1, 1000, 10)[1] == 32
