"""Methods of a comparison: recipes under the protocol of the first one, including random real images as the control."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import RecipeError
from ..recipe import Recipe, differing_keys, parse_recipe, to_dict

RANDOM = "random real"
PROTOCOL = ("data", "squeeze", "relabel", "packaging", "evaluation")
"""Sections that all methods take from the first recipe, in addition to the verifier."""


@dataclass(frozen=True)
class Method:
    """One method of a comparison: its label in tables and figures, and its recipe under the protocol."""

    label: str
    recipe: Recipe

    @property
    def control(self) -> bool:
        """True if this method is random real images."""
        return self.recipe.method == "random"

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.label} ipc{self.recipe.synthesis.ipc}".lower()).strip("-")[:80]

    def seeded(self, seed: int, teachers: int | None = None) -> Recipe:
        """Return the recipe of one run, with the same seed for synthesis and student.

        Runs share their teachers, which are squeezed with the recipe's own seed, or with the seed `teachers`.
        """
        base = self.recipe
        own = base.seed if base.squeeze.seed is None else base.squeeze.seed
        squeeze = replace(base.squeeze, seed=own if teachers is None else teachers)
        evaluation = replace(base.evaluation, seeds=(seed,))
        return replace(base, name=self.slug, seed=seed, squeeze=squeeze, evaluation=evaluation)


def under_one_protocol(recipes: Sequence[tuple[str, Recipe]], *, own: Sequence[str] = ()) -> tuple[list[Method], list[str]]:
    """Put labeled recipes under the protocol of the first one, and add random real images for each ipc.

    Each recipe keeps its `own` sections. Returns the methods, controls first, and one line for each overridden value.

    Raises:
        RecipeError: Two methods have the same name, or a recipe does not work under the protocol.
    """
    if not recipes:
        raise RecipeError("expected at least one recipe to compare with random real images, got none")
    first_label, first = recipes[0]
    methods, notes = [], []
    for label, recipe in recipes:
        values, shared = to_dict(recipe), to_dict(first)
        cell = values["relabel"]["view"]["cell"]  # belongs to the images, not to the protocol
        values |= {key: shared[key] for key in (*PROTOCOL, "seed") if key not in own}
        view = values["relabel"]["view"] | {"cell": cell}
        values["relabel"] = values["relabel"] | {"view": view}
        values["teachers"]["verifier"] = first.teachers.verifier  # type: ignore[index]
        origin = label if recipe is first else f"{label} under the protocol of {first.name}"
        common = parse_recipe(values, origin=origin)
        methods.append(Method(label, common))
        changed = [key for key in differing_keys(recipe, common) if key not in ("seed", "method")]
        notes += [f"{label}: {key} is taken from {first_label}" for key in changed]
    sizes = dict.fromkeys(method.recipe.synthesis.ipc for method in methods)
    with_control = {method.recipe.synthesis.ipc for method in methods if method.control}
    for ipc in sizes:
        if ipc not in with_control:
            label = RANDOM if len(sizes) == 1 else f"{RANDOM}, ipc {ipc}"
            methods.append(Method(label, random_recipe(first, ipc)))
    methods.sort(key=lambda method: not method.control)
    slugs = [re.sub(r"-ipc\d+$", "", method.slug) for method in methods]
    duplicate = next((method.label for method, slug in zip(methods, slugs, strict=True) if slugs.count(slug) > 1), None)
    if duplicate is not None:
        raise RecipeError(f"two methods are called {duplicate!r}; give each recipe its own name")
    return methods, notes


def random_recipe(recipe: Recipe, ipc: int) -> Recipe:
    """Return the recipe for random real images under the protocol of another recipe."""
    values = to_dict(recipe)
    teachers = {"logit": recipe.teachers.logit, "verifier": recipe.teachers.verifier}
    values |= {"name": f"random-ipc{ipc}", "method": "random", "synthesis": {"ipc": ipc}, "teachers": teachers}
    values["relabel"]["view"]["cell"] = None
    return parse_recipe(values, origin=RANDOM)
