import threading

import pytest

from qwen.prefix_cache import KeptSequence, PrefixCache, common_prefix


def kept(ids, *, key=1.0, nbytes=10, state=None):
    return KeptSequence(tuple(ids), key, nbytes, state)


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ([], [1], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 3, 2], 1),
        ([4], [5], 0),
    ],
)
def test_common_prefix(first, second, count):
    assert common_prefix(first, second) == common_prefix(second, first) == count


def test_longest_common_prefix_is_taken_and_taken_once():
    cache = PrefixCache(100)
    for ids in ([1, 2, 9], [1, 2, 3, 4], [7]):
        cache.put(kept(ids))
    assert cache.take([1, 2, 3, 5], key=1.0).kept.ids == (1, 2, 3, 4)
    assert cache.take([1, 2, 3, 5], key=1.0).kept.ids == (1, 2, 9)
    assert cache.take([1, 2, 3, 5], key=1.0) is None


def test_conversation_of_which_a_prompt_has_less_than_half_stays_kept():
    cache = PrefixCache(100)
    cache.put(kept([1, 2, 3, 4, 5]))
    found = cache.take([1, 2, 9], key=1.0)
    assert (found.num_common, found.is_taken, cache.nbytes) == (2, False, 10)
    found = cache.take([1, 2, 3, 9], key=1.0)
    assert (found.num_common, found.is_taken, cache.nbytes) == (3, True, 0)


def test_shrinking_lets_go_of_the_least_recently_used():
    cache = PrefixCache(100)
    for ids in ([1], [2], [3]):
        cache.put(kept(ids))
    cache.shrink(20)
    assert (cache.nbytes, cache.take([1], key=1.0)) == (20, None)


def test_sequence_of_another_key_is_of_no_use():
    cache = PrefixCache(100)
    cache.put(kept([1, 2], key=3.0))
    assert cache.take([1, 2], key=1.0) is None


def test_least_recently_used_goes_first_and_the_bound_holds():
    cache = PrefixCache(30)
    for ids in ([1], [2], [3]):
        cache.put(kept(ids))
    cache.put(cache.take([1], key=1.0).kept)  # used again
    cache.put(kept([4]))
    assert cache.nbytes == 30
    assert cache.take([2], key=1.0) is None
    assert cache.take([1], key=1.0) is not None


def test_one_that_is_larger_than_the_bound_is_not_kept_and_drives_nothing_out():
    cache = PrefixCache(30)
    cache.put(kept([1]))
    cache.put(kept([2], nbytes=31))
    assert cache.take([2], key=1.0) is None
    assert cache.take([1], key=1.0) is not None


def test_beginning_of_a_kept_sequence_is_not_kept_beside_it():
    cache = PrefixCache(100)
    cache.put(kept([1, 2]))
    cache.put(kept([1, 2, 3]))
    assert cache.nbytes == 10


def test_bound_of_zero_keeps_nothing():
    cache = PrefixCache(0)
    cache.put(kept([1]))
    assert cache.take([1], key=1.0) is None


def test_cleared_cache_holds_nothing():
    cache = PrefixCache(100)
    cache.put(kept([1]))
    cache.clear()
    assert (cache.nbytes, cache.take([1], key=1.0)) == (0, None)


def test_threads_never_share_a_sequence():
    cache, taken = PrefixCache(10_000), []
    for number in range(200):
        cache.put(kept([1, number + 2], state=number))

    def work():
        while (found := cache.take([1], key=1.0)) is not None:
            taken.append(found.kept.state)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(200))
