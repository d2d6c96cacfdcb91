"""How good a dataset is: students, similarity, the honest table."""

from .diversity import Diversity, intra_class_similarity
from .feature_map import FeatureMap, pair_histogram
from .report import (
    LABELS,
    NO_CONTROL,
    Evaluation,
    Score,
    SetFacts,
    bytes_text,
    cosine_text,
    difference,
    markdown_table,
    percent_text,
    plain_table,
    summary,
    table_rows,
    top1_text,
    verdict,
)
from .scores import Source, StudentTask, is_scored, read_scores, set_facts, student_tasks, train_and_score
from .students import KEPT, Labels, Row, keep_student, label_bytes, train_student
