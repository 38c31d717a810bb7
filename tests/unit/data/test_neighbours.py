import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from braintumor.data import duplicates, neighbours
from braintumor.data.duplicates import (
    SYMMETRIES,
    CopyIndex,
    Links,
    build_index,
    find_links,
    load_index,
    name_groups,
    parts,
)
from braintumor.data.fingerprint_store import FingerprintFiles, Fingerprints, FingerprintWriter
from braintumor.errors import UserError

COPY_CORRELATION = 0.88


def draw(count: int, seed: int) -> NDArray[np.float32]:
    """Unlike fingerprints: noise as smooth as one, by repeating each pixel three times."""
    noise = np.random.default_rng(seed).normal(size=(count, 32, 32)).astype(np.float32)
    return units(noise.repeat(3, axis=1).repeat(3, axis=2))


def units(values: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = values - values.mean(axis=(1, 2), keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=(1, 2), keepdims=True))


def alike(prints: NDArray[np.float32], correlation: float, seed: int) -> NDArray[np.float32]:
    return units(correlation * prints + float(np.sqrt(1 - correlation**2)) * draw(len(prints), seed))


def in_symmetries(prints: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    steps = [SYMMETRIES[number] for number in np.random.default_rng(seed).integers(len(SYMMETRIES), size=len(prints))]
    return np.stack([one[::rows, ::columns] for one, (rows, columns) in zip(prints, steps, strict=True)])


def shuffled_set(seed: int = 0) -> Fingerprints:
    """Images without copies, pairs and chains of copies in all symmetries, the same pixels twice, and no texture."""
    single, paired = draw(300, seed), draw(100, seed + 1)
    copies = in_symmetries(alike(paired, 0.93, seed + 2), seed + 3)
    copies_of_copies = in_symmetries(alike(copies[:30], 0.93, seed + 4), seed + 5)
    neither = alike(paired[:30], 0.8, seed + 6)
    everything = [single, paired, copies, copies_of_copies, neither, single[:20], np.zeros((10, 96, 96), np.float32)]
    prints = np.concatenate(everything)
    return prints[np.random.default_rng(seed).permutation(len(prints))].astype(np.float16)


def groups_of(prints: Fingerprints, approximate_above: int, n_parts: int = 1) -> list[str]:
    index = build_index(prints, approximate_above=approximate_above)
    names = [f"{row:064d}" for row in range(len(prints))]
    links = [find_links(prints, index, part, COPY_CORRELATION) for part in parts(len(prints), n_parts)]
    return name_groups([name[::-1] for name in names], [None] * len(prints), links)


def links_as_list(links: Links) -> list[tuple[int, int]]:
    return list(zip(links.first.tolist(), links.second.tolist(), strict=True))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "SEARCH_BLOCK", 32)


def test_the_groups_are_those_of_the_exact_search() -> None:
    prints = shuffled_set()
    exact = groups_of(prints, len(prints))
    assert groups_of(prints, 0) == exact
    assert len(set(exact)) == 300 + 100 + 30 + 10


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("above", [0, 10_000], ids=["approximate", "exact"])
def test_the_groups_are_the_same_for_every_division_of_the_work(above: int) -> None:
    prints = shuffled_set(10)
    whole = groups_of(prints, above)
    for n_parts in (3, 7, 40):
        assert groups_of(prints, above, n_parts) == whole


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("above", [0, 10_000], ids=["approximate", "exact"])
def test_a_part_does_only_its_share(above: int) -> None:
    prints = shuffled_set(20)
    index = build_index(prints, approximate_above=above)
    n_links = []
    for part in parts(len(prints), 4):
        blocks: list[None] = []
        n_links.append(
            len(find_links(prints, index, part, COPY_CORRELATION, lambda seen=blocks: seen.append(None)).first)
        )
        assert len(blocks) == -(-len(part) // 32)
    whole = len(find_links(prints, index, range(len(prints)), COPY_CORRELATION).first)
    assert whole <= sum(n_links) <= 2 * whole
    assert max(n_links) < whole


def test_parts_are_whole_blocks_and_cover_every_image_once() -> None:
    for count in (0, 1, 511, 512, 513, 5000):
        for n_parts in (1, 2, 3, 20):
            divided = parts(count, n_parts)
            assert len(divided) == n_parts
            assert [row for part in divided for row in part] == list(range(count))
            assert all(part.start % 512 == 0 or not part for part in divided)


def test_a_part_that_cuts_a_block_and_an_index_of_other_images_are_refused() -> None:
    prints = draw(700, 0).astype(np.float16)
    index = build_index(prints, approximate_above=0)
    with pytest.raises(ValueError, match="whole blocks"):
        find_links(prints, index, range(100, 512), COPY_CORRELATION)
    with pytest.raises(ValueError, match="whole blocks"):
        find_links(prints, index, range(0, 600), COPY_CORRELATION)
    with pytest.raises(ValueError, match="of 700 images"):
        find_links(prints[:600], index, range(600), COPY_CORRELATION)


def test_every_part_reads_fingerprints_and_index_from_files(tmp_path: Path) -> None:
    prints = shuffled_set(30)
    with FingerprintWriter(tmp_path / "prints.npy") as writer:
        writer.append(prints)
    expected = groups_of(prints, 0)
    with FingerprintFiles([tmp_path / "prints.npy"]) as store:
        duplicates.save_index(build_index(store, approximate_above=0), tmp_path / "index.npz")
        links = [
            find_links(store, load_index(tmp_path / "index.npz"), part, COPY_CORRELATION)
            for part in parts(len(store), 3)
        ]
    digests = [f"{row:064d}"[::-1] for row in range(len(prints))]
    assert name_groups(digests, [None] * len(prints), links) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.npz", "prints.npy"]


@pytest.mark.parametrize("above", [0, 10_000], ids=["approximate", "exact"])
def test_a_damaged_index_is_refused(tmp_path: Path, above: int) -> None:
    path = tmp_path / "index.npz"
    with pytest.raises(UserError, match="make it again"):
        load_index(path)
    duplicates.save_index(build_index(shuffled_set(), approximate_above=above), path)
    content = path.read_bytes()
    for damaged in (content[:-50], content[:100], b"", content[:90] + b"?" + content[91:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="make it again"):
            load_index(path)
    np.savez(path, count=np.array(5), rows=np.arange(5))
    with pytest.raises(UserError, match="make it again"):
        load_index(path)


DENSE_CLIQUES, DENSE_SIZE = 20, 250


@pytest.fixture(scope="module")
def dense() -> tuple[Fingerprints, CopyIndex]:
    """5,000 copies of one slice in 20 cliques, far closer to each other than to the rest, among other images."""
    centres = in_symmetries(alike(draw(1, 0).repeat(DENSE_CLIQUES, axis=0), 0.95, 1), 2)
    members = alike(centres.repeat(DENSE_SIZE, axis=0), 0.9995, 3)
    prints = np.concatenate([members.astype(np.float16), draw(100, 4).astype(np.float16)])
    prints = prints[np.random.default_rng(5).permutation(len(prints))]
    return prints, build_index(prints, approximate_above=0)


def count_groups(prints: Fingerprints, index: CopyIndex) -> int:
    links = find_links(prints, index, range(len(prints)), COPY_CORRELATION)
    return len(set(name_groups([f"{row:064d}"[::-1] for row in range(len(prints))], [None] * len(prints), [links])))


def test_thousands_of_copies_of_one_slice_stay_one_group_though_each_keeps_few_neighbours(
    dense: tuple[Fingerprints, CopyIndex],
) -> None:
    prints, index = dense
    assert index.neighbours is not None
    first, _, _ = neighbours.Search(index.neighbours).candidates(range(512), COPY_CORRELATION)
    assert len(first) / 512 < 4 * neighbours.KEPT
    assert count_groups(prints, index) == 1 + 100


def test_without_samples_the_cliques_of_a_dense_group_fall_apart(
    dense: tuple[Fingerprints, CopyIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours.Search, "_samples", lambda _: iter([None]))
    assert count_groups(*dense) == DENSE_CLIQUES + 100


def test_equal_descriptions_are_searched_once_and_still_found_with_their_mirrored_copies() -> None:
    slice_ = draw(1, 7)
    same = slice_.repeat(2000, axis=0)
    prints = np.concatenate([same, same[:, :, ::-1][:1], draw(300, 8)]).astype(np.float16)
    index = build_index(prints, approximate_above=0)
    assert index.neighbours is not None
    assert len(index.neighbours.rows) == 1 + 1 + 300
    assert len(set(groups_of(prints, 0))) == 301


def test_images_without_texture_and_very_few_images_need_no_neighbours() -> None:
    for prints in (np.zeros((70, 96, 96), np.float16), draw(1, 0).astype(np.float16), shuffled_set()[:5]):
        assert groups_of(prints, 0) == groups_of(prints, 10_000)


def test_the_index_and_the_links_do_not_depend_on_the_number_of_threads() -> None:
    prints = shuffled_set(40)
    found = []
    usual = faiss.omp_get_max_threads()
    try:
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            index = build_index(prints, approximate_above=0)
            assert index.neighbours is not None
            links = find_links(prints, index, range(len(prints)), COPY_CORRELATION)
            found.append((index.neighbours.centroids.tolist(), index.neighbours.cells.tolist(), links_as_list(links)))
    finally:
        faiss.omp_set_num_threads(usual)
    assert found[0] == found[1]
    assert found[0][2]


def test_the_correlation_of_a_pair_is_the_same_in_any_company() -> None:
    prints = shuffled_set()[:200]
    rng = np.random.default_rng(0)
    pairs = duplicates.Pairs(rng.integers(200, size=500), rng.integers(200, size=500), rng.integers(4, size=500))
    together = duplicates.correlations(prints, pairs)
    swapped = duplicates.Pairs(pairs.second, pairs.first, pairs.symmetry)
    assert (duplicates.correlations(prints, swapped) == together).all()
    alone = [
        duplicates.correlations(prints, duplicates.Pairs(*(column[[place]] for column in vars(pairs).values())))[0]
        for place in range(0, 500, 10)
    ]
    assert alone == together[::10].tolist()


def test_faiss_is_loaded_by_the_approximate_search_alone() -> None:
    program = (
        "import sys, numpy as np\n"
        "from braintumor.data.duplicates import group_copies\n"
        "group_copies(['a', 'b'], [None, None], np.zeros((2, 96, 96), np.float16), 0.9)\n"
        "assert 'faiss' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
