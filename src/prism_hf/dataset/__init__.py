"""The format of a distilled dataset: tables, provenance, reading, checking, export."""

from .format import DISTILLED, IMAGES, RANDOM_REAL, VIEWS, Shard, image_features, image_shards, view_features, view_shards
from .provenance import FileEntry, Provenance, read_provenance, versions, write_provenance
from .reader import DistilledDataset, load_distilled
from .verify import check_folder
from .writer import ImageRows, build_dataset, image_tables, view_tables, write_parquet
