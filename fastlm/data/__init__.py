"""Text to training batches: a corpus split by file, tokenizers, memory-mapped token shards, batches by number."""

from fastlm.data.batches import IGNORE, RandomWindows, SequentialWindows
from fastlm.data.corpus import Corpus, from_paths, standard_library
from fastlm.data.dataset import Dataset, prepare
from fastlm.data.files import atomic_file, atomic_folder, recover_folder
from fastlm.data.labelled import ClassifiedText, LabelledBatches, TaggedText
from fastlm.data.masking import MaskedText, prepare_masked
from fastlm.data.parallel import ParallelText, pad_sources, read_pairs, target_texts
from fastlm.data.shards import Shard, open_shard, write_shard
from fastlm.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    make_tokenizer,
)

__all__ = [
    "IGNORE",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "ClassifiedText",
    "Corpus",
    "Dataset",
    "LabelledBatches",
    "MaskedText",
    "ParallelText",
    "RandomWindows",
    "SequentialWindows",
    "Shard",
    "TaggedText",
    "Tokenizer",
    "WordTokenizer",
    "atomic_file",
    "atomic_folder",
    "from_paths",
    "load_tokenizer",
    "make_tokenizer",
    "open_shard",
    "pad_sources",
    "prepare",
    "prepare_masked",
    "read_pairs",
    "recover_folder",
    "standard_library",
    "target_texts",
    "write_shard",
]
