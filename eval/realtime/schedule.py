"""Which action of which chunk is due at a control step, and when to ask for the next chunk; no clock, no thread."""

from policy.registry import choose

MODES = ("async", "sync")
REPLAN = ("needed", "always")


class ChunkSchedule:
    """Chunks (T, Da) against the time table of policy/dataset/windows.py, in control steps.

    Index To - 1 + n of a chunk is for n steps after its ``origin``.

    * "async": the origin is the observed step, so the actions for the time that inference took are skipped. With replan
      "needed" inference starts when what is left of Ta actions is what it is expected to need, with "always" as soon as
      the last one is done. A chunk that comes later than expected finds the remaining ones of T in use, then holds.
    * "sync": stop, infer, execute Ta actions. The robot stands meanwhile, so the origin is the step of the arrival.

    Source: naive asynchronous and synchronous inference of arXiv 2506.07339. Raises ValueError for impossible options.
    """

    def __init__(self, *, mode, replan, horizon, obs_steps, action_steps):
        choose("mode", mode, MODES)
        choose(f"replan (mode {mode})", replan, REPLAN if mode == "async" else REPLAN[:1])
        self.sync, self.always = mode == "sync", replan == "always"
        self.horizon, self.now, self.action_steps = horizon, obs_steps - 1, action_steps
        self.usable = action_steps if self.sync else horizon - self.now
        self.chunk = self.origin = self.last = None
        self.observed = None  # step whose observation inference works on
        self.executed = []  # actions taken from each chunk that was joined
        self.holds = []  # steps without an action of their own
        self.too_late = 0  # chunks none of whose actions was still to come

    def due(self, step, expected):
        """Whether inference should start from the observation of ``step``; expected: steps that it will take."""
        if self.observed is not None or (self.chunk is not None and step <= self.origin):
            return False
        if self.chunk is None or self.always:
            return True
        left = self.action_steps - (step - self.origin)
        return left <= (0 if self.sync else expected)

    def start(self, step):
        """Inference starts; returns the guess of a warm start, {"previous": (1, T, Da), "elapsed"}, {} if none."""
        self.observed = step
        elapsed = None if self.chunk is None else step - self.origin
        return {} if elapsed is None or elapsed >= self.horizon else {"previous": self.chunk[None], "elapsed": elapsed}

    def join(self, chunk, step):
        """Inference ended: ``chunk`` (T, Da) is in use from ``step`` on, unless all of it is past."""
        origin = step if self.sync else self.observed
        self.observed = None
        if step - origin >= self.usable:
            self.too_late += 1
            return
        self.chunk, self.origin = chunk, origin
        self.executed.append(0)

    def action(self, step):
        """The action (Da,) of ``step``, once a chunk was joined; where none is left the last one again, a hold."""
        number = step - self.origin
        if number < self.usable:
            self.last = self.chunk[self.now + number]
            self.executed[-1] += 1
        else:
            self.holds.append(step)
        return self.last
