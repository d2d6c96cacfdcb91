"""The science of the paper, one file per idea, in the order of docs/method.md.

start_images   which real image, or mosaic of real patches, each slot starts from
alignment      how far the statistics of a batch are from those that a frozen network has seen
statistics     means and variances with their gradients in closed form, and their averages over real data
densification  images of a class span more directions
objective      the loss of one step and its gradient, teacher by teacher
synthesis      the loop over steps: view, gradient, Adam
relabel        views of the shipped images, labeled by the teachers
soft_labels    the losses of a student on these labels

Nothing here knows files, locks, checkpoints, progress, stop signals or the network.
"""

from .alignment import Alignment
from .objective import Precision
from .relabel import ask_teachers, relabel_batches, relabel_epoch
from .soft_labels import class_shares, soft_label_loss
from .start_images import SCORED, check_candidates, choose_start_images, real_rows
from .statistics import BATCH_SIZE, gather_statistics, shuffled_batches
from .synthesis import Step, synthesize
