import random

import pytest

from benthic.inference.pages import PagePool, chain_key, root_key


@pytest.mark.parametrize("seed", range(20))
def test_no_page_is_ever_lost_or_held_twice(seed):
    """Random takers, sharers and releasers against a ledger of who holds what."""
    rng = random.Random(seed)
    pool = PagePool(rng.randint(1, 30))
    alone, shared = [], []
    for _ in range(600):
        act_at_random(pool, alone, shared, rng)
        check_ledger(pool, alone, shared)
    for pages in alone:
        pool.give_back(pages)
    for chunk in shared:
        pool.release(chunk)
    assert pool.available == pool.total
    assert sorted(pool.take(pool.total)) == list(range(pool.total))


def act_at_random(pool, alone, shared, rng):
    action, keys = rng.choice(["take", "give", "share", "find", "release"]), [bytes([i]) for i in range(8)]
    if action == "take":
        count = rng.randint(1, 4)
        fits = count <= pool.available
        pages = pool.take(count)
        assert (pages is not None) == fits
        if pages is not None:
            alone.append(pages)
    elif action == "give" and alone:
        pool.give_back(alone.pop(rng.randrange(len(alone))))
    elif action == "share" and alone:
        pages = alone.pop(rng.randrange(len(alone)))
        chunk = pool.share(rng.choice(keys), pages, has_drafts=rng.random() < 0.5)
        if chunk is None:
            alone.append(pages)
        else:
            shared.append(chunk)
    elif action == "find" and (chunk := pool.find(rng.choice(keys), with_drafts=rng.random() < 0.5)):
        shared.append(chunk)
    elif action == "release" and shared:
        pool.release(shared.pop(rng.randrange(len(shared))))


def check_ledger(pool, alone, shared):
    held = [page for pages in alone for page in pages]
    held += [page for chunk in {id(c): c for c in shared}.values() for page in chunk.pages]
    assert len(held) == len(set(held)) == pool.used
    assert set(held) <= set(range(pool.total))
    assert all(chunk.users == sum(other is chunk for other in shared) for chunk in shared)


def test_the_chunk_unused_for_longest_goes_and_the_end_of_a_prompt_before_its_beginning():
    pool = PagePool(4)
    chunks = [pool.share(key, pool.take(1), has_drafts=True) for key in (b"a", b"ab", b"x", b"xy")]
    for chunk in (chunks[1], chunks[0], chunks[3], chunks[2]):  # each prompt from its end
        pool.release(chunk)
    pool.release(pool.find(b"a"))
    order = []
    for _ in range(4):
        held = pool.take(1)
        assert held
        order.append(next(key for key in (b"a", b"ab", b"x", b"xy") if key not in order and not _there(pool, key)))
    assert order == [b"ab", b"xy", b"x", b"a"]
    assert pool.evictions == 4


def _there(pool, key):
    return key in pool._chunks


def test_a_used_chunk_is_never_evicted():
    pool = PagePool(2)
    chunk = pool.share(b"a", pool.take(1), has_drafts=True)
    assert pool.in_use(b"a")
    assert pool.take(2) is None
    assert pool.take(1) is not None
    pool.release(chunk)
    assert not pool.in_use(b"a")
    assert (pool.used, pool.cached, pool.available) == (1, 1, 1)


def test_a_chunk_with_drafts_takes_the_place_of_one_without():
    pool = PagePool(4)
    for plain_is_used in (True, False):
        plain = pool.share(b"a", pool.take(1), has_drafts=False)
        assert pool.find(b"a", with_drafts=True) is None
        if not plain_is_used:
            pool.release(plain)
        better = pool.share(b"a", pool.take(1), has_drafts=True)
        assert pool.share(b"a", pool.take(1), has_drafts=False) is None
        assert pool.find(b"a") is pool.find(b"a", with_drafts=True) is better
        if plain_is_used:
            pool.release(plain)
        assert (pool.used, pool.cached) == (2, 0)
        pool = PagePool(4)


def test_keys_tell_apart_tokens_order_beginnings_and_scopes():
    root = root_key("")
    keys = [
        chain_key(root, [1, 2]), chain_key(root, [2, 1]), chain_key(root, [258]), chain_key(root, [1, 2, 0]),
        chain_key(chain_key(root, [1]), [2]), chain_key(root_key("other"), [1, 2]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert chain_key(root, [1, 2]) == keys[0]
