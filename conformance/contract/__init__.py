"""What is to be computed: dimensions, arguments, stages, models and kernels' declarations.

A contract knows nothing of PyPTO or pytest. The stages of a model are declared in ``kernels/<model>/contract.py``.
"""

from conformance.contract.arguments import Argument as Argument
from conformance.contract.arguments import read as read
from conformance.contract.arguments import update as update
from conformance.contract.arguments import write as write
from conformance.contract.dims import Dims as Dims
from conformance.contract.registry import Model as Model
from conformance.contract.registry import preset_named as preset_named
from conformance.contract.registry import presets as presets
from conformance.contract.registry import stage_named as stage_named
from conformance.contract.registry import stages as stages
from conformance.contract.stage import Stage as Stage
from conformance.contract.stage import Tensors as Tensors
from conformance.contract.stage import layer_of as layer_of
