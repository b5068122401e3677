"""The half of a backend that would compile."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target) -> bool:
        return False

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("the interpreter compiles nothing")

    def add_stages(self, stages: dict, options: object, language) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def load_dialects(self, context) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def get_module_map(self) -> dict:
        return {}
