"""Every group of options: a field is a flag, a key of the YAML file and an argument in Python, with one default and one check."""

from .data import DataOptions as DataOptions
from .data import GroupOptions as GroupOptions
from .data import PairData as PairData
from .data import PromptData as PromptData
from .data import RowOptions as RowOptions
from .model import AdapterOptions as AdapterOptions
from .model import BaseOptions as BaseOptions
from .model import ModelOptions as ModelOptions
from .objective import CPOOptions as CPOOptions
from .objective import DistillOptions as DistillOptions
from .objective import DPOOptions as DPOOptions
from .objective import GRPOOptions as GRPOOptions
from .objective import KTOOptions as KTOOptions
from .objective import ObjectiveOptions as ObjectiveOptions
from .objective import OnlineDPOOptions as OnlineDPOOptions
from .objective import ORPOOptions as ORPOOptions
from .objective import SFTOptions as SFTOptions
from .output import Output as Output
from .sampling import OwnSampling as OwnSampling
from .sampling import PairSampling as PairSampling
from .sampling import RewardOptions as RewardOptions
from .sampling import SamplingOptions as SamplingOptions
from .training import Training as Training
