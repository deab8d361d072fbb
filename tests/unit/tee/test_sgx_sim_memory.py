"""The memory encryption engine against whoever can read and write its backing store."""

from __future__ import annotations

import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inclavare.errors import IntegrityError
from inclavare.sgx.image import PAGE_SIZE
from inclavare.tee.sgx_sim.memory import ARITY, MemoryEncryption, Store

PAGES = 65536


def page_of(text: bytes) -> bytes:
    return text.ljust(PAGE_SIZE, b".")


@pytest.fixture
def engine() -> MemoryEncryption:
    """An EPC of 256 MB with four pages of contents: two siblings, a cousin, and one at the far end."""
    made = MemoryEncryption(PAGES)
    for page in (0, 1, ARITY, PAGES - 1):
        made.write(page, page_of(b"page %d" % page))
    return made


def refused_and_locked(engine: MemoryEncryption, access: Callable[[], object]) -> None:
    with pytest.raises(IntegrityError) as caught:
        access()
    assert caught.value.id == "tee.memory.integrity"
    assert engine.locked
    for later in (lambda: engine.read(PAGES - 1), lambda: engine.write(5, bytes(PAGE_SIZE)), lambda: engine.discard(1)):
        with pytest.raises(IntegrityError) as caught:
            later()
        assert caught.value.id == "tee.memory.locked"


def test_what_is_written_is_read(engine: MemoryEncryption) -> None:
    assert engine.read(ARITY) == page_of(b"page 8")
    engine.write(ARITY, memoryview(page_of(b"another")))
    assert engine.read(ARITY) == page_of(b"another")
    assert engine.read(0) == page_of(b"page 0")
    assert not engine.locked


def test_the_store_holds_no_plaintext_and_no_key(engine: MemoryEncryption) -> None:
    secret = page_of(b"a very recognisable page")
    engine.write(3, secret)
    engine.write(4, secret)
    everything = b"".join(
        value for part in (engine.store.pages, engine.store.tags, engine.store.nodes) for value in part.values()
    )
    assert b"recognisable" not in everything and b"...." not in everything
    assert engine._stream_key not in everything and engine._mac_key not in everything
    assert engine.store.pages[3] != engine.store.pages[4]
    before = engine.store.pages[3]
    engine.write(3, secret)
    assert engine.store.pages[3] != before


def test_every_flipped_bit_of_a_page_or_its_tag_is_noticed() -> None:
    for bit in (0, 7, 8 * 2048, 8 * PAGE_SIZE - 1):
        engine = MemoryEncryption(PAGES)
        engine.write(9, page_of(b"x"))
        engine.store.pages[9] = flipped(engine.store.pages[9], bit)
        refused_and_locked(engine, lambda engine=engine: engine.read(9))  # type: ignore[misc]
    for bit in (0, 8 * 16 - 1):
        engine = MemoryEncryption(PAGES)
        engine.write(9, page_of(b"x"))
        engine.store.tags[9] = flipped(engine.store.tags[9], bit)
        refused_and_locked(engine, lambda engine=engine: engine.read(9))  # type: ignore[misc]


@pytest.mark.parametrize("bit", [0, 8 * 7 - 1, 8 * 7, 8 * 56 - 1, 8 * 56, 8 * 64 - 1])
def test_every_flipped_bit_of_a_node_is_noticed_on_each_level(bit: int) -> None:
    """Also in the counters of pages beside the one that is accessed: or a write would sign what was forged."""
    levels = {level for level, _ in _written().store.nodes}
    assert len(levels) > 2
    for level in levels:
        for access in (MemoryEncryption.read, MemoryEncryption.discard, _rewrite):
            engine = _written()
            engine.store.nodes[level, 0] = flipped(engine.store.nodes[level, 0], bit)
            refused_and_locked(engine, lambda access=access, engine=engine: access(engine, 0))  # type: ignore[misc]


def test_a_moved_page_is_noticed(engine: MemoryEncryption) -> None:
    engine.store.pages[1], engine.store.tags[1] = engine.store.pages[0], engine.store.tags[0]
    refused_and_locked(engine, lambda: engine.read(1))


def test_a_moved_node_is_noticed(engine: MemoryEncryption) -> None:
    """Both nodes hold one version of 1 in their first place, so only their places differ."""
    made = MemoryEncryption(PAGES)
    made.write(0, page_of(b"x"))
    made.write(ARITY, page_of(b"y"))
    made.store.nodes[0, 1] = made.store.nodes[0, 0]
    refused_and_locked(made, lambda: made.read(ARITY))


def test_a_node_of_another_level_is_noticed() -> None:
    """Read as versions, the second write's counters would say that the page is empty."""
    made = _written()
    _rewrite(made, 0)
    made.store.nodes[0, 0] = made.store.nodes[1, 0]
    refused_and_locked(made, lambda: made.read(0))


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 99])
def test_a_replayed_page_is_noticed_even_with_its_tree(engine: MemoryEncryption, kept: int) -> None:
    """Page and tag come back, and the old nodes of the lowest ``kept`` levels, or all of them."""
    old = engine.store.copy()
    engine.write(0, page_of(b"newer"))
    engine.store.pages[0], engine.store.tags[0] = old.pages[0], old.tags[0]
    for (level, index), node in old.nodes.items():
        if level < kept:
            engine.store.nodes[level, index] = node
    refused_and_locked(engine, lambda: engine.read(0))


def test_a_page_and_its_node_do_not_return_when_a_neighbours_version_is_the_same() -> None:
    """The counters above a node count its changes: a neighbour's first write must not bring an old value back."""
    engine = MemoryEncryption(PAGES)
    engine.write(0, page_of(b"first"))
    old = engine.store.copy()
    engine.write(0, page_of(b"second"))
    engine.write(1, page_of(b"a neighbour's first"))
    engine.store.pages[0], engine.store.tags[0] = old.pages[0], old.tags[0]
    engine.store.nodes[0, 0] = old.nodes[0, 0]
    refused_and_locked(engine, lambda: engine.read(0))


def test_the_whole_store_replayed_is_noticed(engine: MemoryEncryption) -> None:
    old = engine.store.copy()
    engine.write(0, page_of(b"newer"))
    engine.store.pages, engine.store.tags, engine.store.nodes = old.pages, old.tags, old.nodes
    refused_and_locked(engine, lambda: engine.write(1, bytes(PAGE_SIZE)))


def test_a_discarded_page_reads_as_zeros_and_does_not_return(engine: MemoryEncryption) -> None:
    old = engine.store.copy()
    engine.discard(0)
    assert 0 not in engine.store.pages and 0 not in engine.store.tags
    assert engine.read(0) == bytes(PAGE_SIZE)
    engine.store.pages[0], engine.store.tags[0] = old.pages[0], old.tags[0]
    assert engine.read(0) == bytes(PAGE_SIZE)
    engine.write(0, page_of(b"again"))
    assert engine.read(0) == page_of(b"again")
    engine.store.pages[0], engine.store.tags[0] = old.pages[0], old.tags[0]
    refused_and_locked(engine, lambda: engine.read(0))


@pytest.mark.parametrize("part", ["pages", "tags", "nodes"])
def test_what_is_missing_is_noticed(engine: MemoryEncryption, part: str) -> None:
    getattr(engine.store, part).clear()
    refused_and_locked(engine, lambda: engine.read(0))


def test_what_is_put_where_nothing_was_written_changes_nothing() -> None:
    engine = MemoryEncryption(PAGES)
    engine.store.pages[7], engine.store.tags[7] = page_of(b"forged"), bytes(16)
    engine.store.nodes[0, 0] = b"\x01" * 64
    assert engine.read(7) == bytes(PAGE_SIZE)
    engine.write(6, page_of(b"mine"))
    assert engine.read(7) == bytes(PAGE_SIZE) and engine.read(6) == page_of(b"mine")


def test_a_page_of_another_session_is_noticed(engine: MemoryEncryption) -> None:
    other = MemoryEncryption(PAGES)
    other.write(0, page_of(b"page 0"))
    other.store = engine.store
    refused_and_locked(other, lambda: other.read(0))


def test_an_epc_costs_nothing_until_it_is_written() -> None:
    tracemalloc.start()
    engine = MemoryEncryption(8 << 20)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 16384
    assert engine.read((8 << 20) - 1) == bytes(PAGE_SIZE)
    assert engine.store == Store()


def test_lengths_and_page_numbers_are_checked(engine: MemoryEncryption) -> None:
    for data in (b"", bytes(PAGE_SIZE - 1), bytes(PAGE_SIZE + 1)):
        with pytest.raises(ValueError, match="4096"):
            engine.write(0, data)
    for page in (-1, PAGES):
        for access in (MemoryEncryption.read, MemoryEncryption.discard, _rewrite):
            with pytest.raises(ValueError, match="EPC page"):
                access(engine, page)
    assert not engine.locked


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 64, 512, 513, 70000]),
    st.lists(st.tuples(st.integers(0, 69999), st.one_of(st.none(), st.binary(min_size=1, max_size=8))), max_size=30),
)
def test_it_is_memory(pages: int, steps: list[tuple[int, bytes | None]]) -> None:
    """Any order of writes and discards, on trees of every height, reads like plain memory."""
    engine, plain = MemoryEncryption(pages), {}
    for number, content in steps:
        page = number % pages
        if content is None:
            engine.discard(page)
            plain.pop(page, None)
        else:
            engine.write(page, page_of(content))
            plain[page] = page_of(content)
    for page in {number % pages for number, _ in steps} | {0, pages - 1}:
        assert engine.read(page) == plain.get(page, bytes(PAGE_SIZE))
    assert engine.store.pages.keys() == plain.keys() == engine.store.tags.keys()


def test_no_cryptographic_library_is_imported() -> None:
    code = "import sys, inclavare.tee.sgx_sim.memory; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")


def _written() -> MemoryEncryption:
    engine = MemoryEncryption(PAGES)
    engine.write(0, page_of(b"x"))
    return engine


def _rewrite(engine: MemoryEncryption, page: int) -> None:
    engine.write(page, page_of(b"again"))


def test_threads_do_not_take_each_other_for_attackers() -> None:
    engine = MemoryEncryption(64)
    wrong: list[object] = []

    def work(mine: int) -> None:
        try:
            for turn in range(150):
                for page in range(mine, 64, 8):
                    engine.write(page, bytes([turn % 251 + 1]) * PAGE_SIZE)
                    if engine.read(page) != bytes([turn % 251 + 1]) * PAGE_SIZE:
                        wrong.append(page)
                if turn % 7 == 0:
                    engine.discard(mine)
        except Exception as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == [] and not engine.locked


def test_tags_are_made_with_a_key_of_the_session() -> None:
    """Who knows everything about a page but the key cannot make its tag, nor that of a node."""
    engines = [MemoryEncryption(64), MemoryEncryption(64)]
    for engine in engines:
        engine._stream_key = bytes(32)
        engine.write(3, b"x" * PAGE_SIZE)
    one, other = (engine.store for engine in engines)
    assert one.pages == other.pages
    assert one.tags[3] != other.tags[3] and len(one.tags[3]) == 16
    assert one.nodes.keys() == other.nodes.keys()
    assert all(one.nodes[key][:-8] == other.nodes[key][:-8] and one.nodes[key] != other.nodes[key] for key in one.nodes)
