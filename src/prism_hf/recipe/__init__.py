"""Recipes: their sections, value ranges, YAML files and plans. This package does not need torch."""

from .describe import cache_needed, describe_plan, space_needed
from .labels import VIEW_ROW_BYTES, Codec, StoredLabels
from .named_classes import NAMED_CLASSES
from .plan import STAGES, TRACKERS, SynthesisJob, batch_ranges, plan_jobs
from .schema import SQUEEZE_PREFIX, TOP_K_LOSSES, Recipe, to_dict
from .sections import (
    NO_IMAGES,
    ClassPart,
    DataRecipe,
    EvaluationRecipe,
    RelabelRecipe,
    RelabelView,
    SqueezeRecipe,
    TeachersRecipe,
)
from .shipped import shipped_recipes, title_of
from .synthesis import SynthesisRecipe, SynthesisView
from .yaml_file import (
    Overrides,
    differing_keys,
    dump_recipe,
    flat_values,
    load_recipe,
    override_recipe,
    parse_recipe,
    public_recipe,
    without_folders,
)
