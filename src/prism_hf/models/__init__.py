"""Networks: load teachers by name, train and score networks, squeeze teachers, and store networks in model folders."""

from .build import build_network, check_network, seeded
from .facts import (
    LICENSE_KEYS,
    DistilledFacts,
    NetworkConfig,
    ScoredOn,
    SourceFacts,
    StudentFacts,
    TeacherFacts,
    read_facts,
)
from .folder import scored_on, source_facts, store_network
from .folding import folded
from .load import load_teacher, load_teachers
from .norms import frozen, normalized_by, replaced, with_bf16_weights
from .squeeze import (
    check_batch,
    check_squeezed,
    clear_scratch,
    is_squeezed,
    read_squeezed,
    squeeze_operations,
    squeeze_steps,
    squeeze_teacher,
    teacher_folder,
)
from .start import architecture_of, input_size_of
from .teacher import Teacher, classifier_of, fit_teacher, penultimate_features
from .training import FUSED, AtStep, Batches, ShuffledBatches, check_optimizer, fit, score
