version: str
max_group_size: int
dtypes: tuple[str, ...]
methods: tuple[str, ...]
methods_that_draw: tuple[str, ...]
methods_on_cuda: tuple[str, ...]
methods_unbiased: tuple[str, ...]
methods_by_group: tuple[str, ...]
tile_24: tuple[int, int]
layouts_24: tuple[str, ...]

def isa() -> str: ...
