"""WebShop: shopping by instruction in a text shop, scored by the benchmark's own formula.

It needs the packages of the extra `environments`.
"""

from services.envs.webshop.environment import WebShopEnvironment

__all__ = ["WebShopEnvironment"]
