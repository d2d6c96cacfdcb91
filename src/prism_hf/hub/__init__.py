"""Cards, figures, and the only code that writes to the Hub."""

from .bundle import bundle_of
from .card import escape, fence_for
from .dataset_card import card_facts, render_card, render_control_card
from .figures import MAX_CLASSES, MAX_SLOTS, STYLE, draw_diversity, draw_grid, grid, plain_name, save_figure, widest
from .push import publish, push_folder, reserve
from .repository import Target, check_here, check_target
