version: str
max_group_size: int
methods: tuple[str, ...]

def isa() -> str: ...
