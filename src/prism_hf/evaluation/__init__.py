"""Evaluation of a dataset: students, similarity, and the table that compares it with its controls."""

from .dd_scores import DDRanking, dd_ranking, dd_ranking_of, dd_ranking_text
from .diversity import Diversity, FeatureMap, intra_class_similarity, pair_histogram
from .report import (
    LABELS,
    NO_CONTROL,
    NOT_ALL,
    bytes_text,
    cosine_text,
    difference,
    evaluation_facts,
    full_is_best,
    markdown_table,
    percent_text,
    plain_table,
    remarks_on,
    score_row,
    summary,
    table_rows,
    top1_text,
    verdict,
)
from .scores import Source, StudentTask, features_of, is_scored, read_scores, set_facts, student_tasks, train_and_score
from .students import KEPT, Labels, Row, epochs_of, keep_student, label_bytes, train_student
