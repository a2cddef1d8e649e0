"""A block store that keeps nothing: each walk does all of its work."""


class Nowhere:
    def load(self, index):
        return None

    def store(self, block):
        pass
