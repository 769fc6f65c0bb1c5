"""Documents of one store that are nearly the same as documents of another, at scale.

The paper (section 2.1) calls two documents near-duplicates when the Jaccard similarity of
their sets of 13-grams is 0.8 or more. Here n-grams are of the store's own token ids, without
the bos and eos that the chunking put around them: both stores have one tokenizer, and nothing
has to be decoded. MinHash signatures propose pairs and the exact similarity decides, so what
is returned is right, and a pair is missed with a small probability that falls as it is more
alike (about 1 % at the threshold, see `lsh_shape`).

data/near_duplicates.py compares texts that fit in memory without sampling; its hashes of
n-grams are used here. What follows from a pair is decided in policies.py.
"""

import functools

import numpy as np

from retro_jax.data.near_duplicates import hash_windows, mix, sharing
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval.database import ChunkDatabase

# datasketch makes a table of so many n-grams times the permutations; it should fit the cache.
_NGRAMS_AT_ONCE = 4096
# Documents between two lines of progress, and n-gram sets kept while pairs are compared.
_DOCUMENTS_AT_ONCE = 256
# What (a candidate in vain, a missed pair) costs the optimiser: the first is one comparison.
_WEIGHTS = (0.01, 0.99)


def near_document_pairs(
    queries: ChunkDatabase, database: ChunkDatabase, threshold: float = 0.8, ngram: int = 13,
    num_perm: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """All pairs of a document of each store whose n-grams are at least `threshold` alike.

  Removed documents are compared as well. Memory: 8 bytes a band (some 20) and document, beside
  one document and what is returned; a text that n documents repeat gives n^2 pairs.

  Args:
    queries, database: two stores of one vocabulary, or twice the same; then no document is
      paired with itself and every pair is there in both orders.
    threshold: exact Jaccard similarity of the n-gram sets, in (0, 1].
    ngram: n; a document of fewer tokens has one n-gram, all of them.
    num_perm: values of a MinHash signature, at least 16.
    seed: of their permutations. It can only change which pairs are missed.

  Returns:
    pairs int64 [p, 2] of ordinals (in `queries`, in `database`), ascending, and their
    similarity float64 [p].

  Raises:
    UserError: the vocabularies differ, or an argument is out of range.
  """
  if not 0 < threshold <= 1 or ngram < 1 or num_perm < 16:
    raise UserError(f'near documents: threshold is {threshold}, ngram {ngram}, num_perm '
                    f'{num_perm}; expected (0, 1], at least 1 and at least 16')
  if queries.vocabulary_fingerprint != database.vocabulary_fingerprint:
    raise UserError(f'{queries.folder} and {database.folder} have different vocabularies; '
                    'build both with the same one to compare their documents')
  same = queries is database or queries.fingerprint == database.fingerprint
  shape = lsh_shape(threshold, num_perm)
  ours = _all_band_keys(queries, ngram, num_perm, seed, shape)
  theirs = ours if same else _all_band_keys(database, ngram, num_perm, seed, shape)
  candidates = _candidates(*ours, *theirs, threshold)
  if same:
    candidates = candidates[candidates[:, 0] < candidates[:, 1]]
  similarity = _similarities(queries, database, candidates, ngram)
  pairs, similarity = candidates[similarity >= threshold], similarity[similarity >= threshold]
  if same:
    pairs, similarity = np.concatenate([pairs, pairs[:, ::-1]]), np.tile(similarity, 2)
  order = np.lexsort((pairs[:, 1], pairs[:, 0]))
  return pairs[order], similarity[order]


def documents_near(
    queries: ChunkDatabase, database: ChunkDatabase, threshold: float = 0.8) -> list[str]:
  """Ids of the documents of `database` that repeat one of `queries`, by ordinal.

  As a deny-list they keep, say, near-copies of test documents out of every search.
  """
  pairs, _ = near_document_pairs(queries, database, threshold)
  return [database.document_info(int(ordinal))['id'] for ordinal in np.unique(pairs[:, 1])]


def document_ngrams(store: ChunkDatabase, ordinal: int, ngram: int = 13) -> np.ndarray:
  """The set of n-grams of one document, as ascending uint64 hashes; none of an empty one."""
  first, last = store.document_starts[ordinal:ordinal + 2]
  ids = np.arange(first, last)
  tokens = store.tokens(ids)[np.arange(store.chunk_length) < store.valid_length(ids)[:, None]]
  text = tokens[1:-1].astype(np.uint64)  # without bos and eos
  return hash_windows(mix(text), ngram)


def signatures(store: ChunkDatabase, first: int, last: int, ngram: int = 13,
               num_perm: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """MinHash signatures of the documents [first, last), a function of its arguments alone.

  Returns:
    uint32 [last - first, num_perm], and how many n-grams each document has, int64.
  """
  from datasketch import MinHash
  # The n-grams are hashes already: their upper halves are numbers as datasketch wants them.
  empty = MinHash(num_perm=num_perm, seed=seed, hashfunc=int)
  result = np.empty((last - first, num_perm), np.uint32)
  sizes = np.empty(last - first, np.int64)
  for row, ordinal in enumerate(range(first, last)):
    ngrams = document_ngrams(store, ordinal, ngram)
    sketch = empty.copy()
    for begin in range(0, len(ngrams), _NGRAMS_AT_ONCE):
      sketch.update_batch((ngrams[begin:begin + _NGRAMS_AT_ONCE] >> np.uint64(32)).tolist())
    result[row], sizes[row] = sketch.hashvalues, len(ngrams)
  return result, sizes


@functools.cache
def lsh_shape(threshold: float, num_perm: int) -> tuple[int, int]:
  """Bands b and values a band r: a pair of Jaccard s is proposed at 1 - (1 - s^r)^b.

  Of 128 permutations for a threshold of 0.8: 0.986 at 0.8, 0.999 at 0.85.
  """
  from datasketch import MinHashLSH
  # Towards 1 the optimiser ends at a single band, which it refuses.
  lsh = MinHashLSH(threshold=min(threshold, 0.95), num_perm=num_perm, weights=_WEIGHTS)
  return lsh.b, lsh.r


def _all_band_keys(store: ChunkDatabase, ngram: int, num_perm: int, seed: int,
                   shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """One key a document and band, uint64 [documents, b], and numbers of n-grams, int64."""
  bands, width = shape
  keys = np.zeros((store.num_documents, bands), np.uint64)
  sizes = np.zeros(store.num_documents, np.int64)
  progress = Progress(f'signatures of {store.folder.name}', store.num_documents, 'documents')
  for first in range(0, store.num_documents, _DOCUMENTS_AT_ONCE):
    last = min(first + _DOCUMENTS_AT_ONCE, store.num_documents)
    values, sizes[first:last] = signatures(store, first, last, ngram, num_perm, seed)
    values = values[:, :bands * width].reshape(-1, bands, width)
    for column in range(width):
      keys[first:last] = mix(keys[first:last] + values[..., column])
    progress.update(last - first)
  progress.close()
  return keys, sizes


def _candidates(
    our_keys: np.ndarray, our_sizes: np.ndarray, their_keys: np.ndarray, their_sizes: np.ndarray,
    threshold: float) -> np.ndarray:
  """Pairs that share a band and are of fit sizes: int64 [p, 2], distinct, ascending."""
  ours, theirs = np.flatnonzero(our_sizes), np.flatnonzero(their_sizes)
  found = np.zeros((0, 2), np.int64)
  for band in range(our_keys.shape[1]):
    places = sharing(our_keys[ours, band, None], their_keys[theirs, band, None])
    pairs = np.stack([ours[places[:, 0]], theirs[places[:, 1]]], 1)
    sizes = np.sort(np.stack([our_sizes[pairs[:, 0]], their_sizes[pairs[:, 1]]]), axis=0)
    # No two sets are more alike than the smaller is large.
    pairs = pairs[sizes[0] >= threshold * sizes[1]]
    found = np.unique(np.concatenate([found, pairs]), axis=0)
  return found


def _similarities(queries: ChunkDatabase, database: ChunkDatabase, pairs: np.ndarray,
                  ngram: int) -> np.ndarray:
  """Exact Jaccard similarity of the n-gram sets of each pair: float64 [p]."""
  of_query = functools.lru_cache(1)(lambda i: document_ngrams(queries, i, ngram))
  of_database = functools.lru_cache(_DOCUMENTS_AT_ONCE)(
      lambda j: document_ngrams(database, j, ngram))
  return np.array([_jaccard(of_query(i), of_database(j)) for i, j in pairs.tolist()], np.float64)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
  common = len(np.intersect1d(a, b, assume_unique=True))
  return common / (len(a) + len(b) - common)
