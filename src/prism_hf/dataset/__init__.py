"""Distilled datasets on disk: tables, provenance, reading, verification and export."""

from .codecs import READING
from .format import DISTILLED, IMAGES, RANDOM_REAL, VIEWS, Shard, image_features, image_shards, view_features, view_shards
from .provenance import Provenance, check_folder, read_provenance, versions, write_provenance
from .reader import DistilledDataset, load_distilled
from .recomputed import with_teachers
from .tables import hub_id_problem
from .writer import Columns, ImageRows, build_dataset, image_tables, view_tables, whole_groups, write_parquet
