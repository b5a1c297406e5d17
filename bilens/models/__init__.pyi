from . import annealing as annealing
from . import checkpoints as checkpoints
from . import files as files
from . import layers as layers
from . import llama as llama
from . import published as published
from . import rotary as rotary
from . import transformer as transformer
