"""What language models take at the released settings, counted without their files; what is said where these lack."""

import pytest

from fsl_sage import preset, train
from fsl_sage.costs.estimate import count, text_sizes
from fsl_sage.papers.comparison import language_run

BLOCK = 2 * 4 * 1024 * 2  # numbers of the adapters on queries and values of a block of GPT-2 medium, rank 4


def test_fed_avg_of_gpt2_medium_sends_adapters_alone():
    """200 rounds, 10 clients, up and down, 24 blocks; what is frozen is held once, at least 1.4 GiB."""
    counted = count(language_run("paper", "fed_avg"))
    assert counted["bytes"] == 200 * 10 * 2 * 24 * 4 * BLOCK
    assert 1.4 * 2**30 < counted["memory"] < 4 * 2**30 and counted["alignment"] == 0


def test_fsl_sage_of_gpt2_medium_ends_with_its_budget():
    """The estimate stops where the run would: within a round above 200 GiB."""
    counted = count(language_run("paper", "fsl_sage"))
    assert 200 * 2**30 <= counted["bytes"] < 210 * 2**30 and counted["alignment"] > 0


def test_texts_are_as_long_as_the_longest_of_their_batch():
    dataset = language_run("quick", "fed_avg").dataset
    words, one = text_sizes(dataset, 1)
    assert text_sizes(dataset, 16)[0] == words and one < text_sizes(dataset, 16)[1] < text_sizes(dataset, 900)[1]
    with pytest.raises(ValueError, match=r"dataset\.name"):
        count(preset("smoke", **{"dataset.name": "of_my_own"}))


def test_without_its_files_the_released_setting_says_where_to_put_them(tmp_path):
    run = language_run("paper", "fsl_sage")
    with pytest.raises(FileNotFoundError, match=r"data set 'e2e' not found; .*testset_w_refs\.csv.*FSL_SAGE_DATA"):
        train(run, "cpu", tmp_path, progress=False)


@pytest.mark.parametrize("name", ["sl_single_server", "fsl_sage"])
@pytest.mark.parametrize("bottleneck", [None, 2])
def test_the_estimate_is_what_a_run_sends(name, bottleneck):
    run = preset("smoke", name, rounds=2, num_clients=3, **{"defence.bottleneck": bottleneck, "dataset.max_train": 120})
    assert count(run)["bytes"] == train(run, "cpu", progress=False).rounds.paper_bytes.iloc[-1]
