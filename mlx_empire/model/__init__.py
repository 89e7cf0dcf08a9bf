"""Which model it is: its configuration, mlx-lm's lazily built module, its shapes as numbers, adapters and quantization.

No weight is computed here but the first values of adapters and what `quantize` packs.
"""

from mlx_empire.model.mlx_lm_modules import enter_packages

enter_packages()
