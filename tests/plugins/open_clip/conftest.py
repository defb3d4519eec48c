from __future__ import annotations

from encoder_fixtures import assert_rejected as assert_rejected
from encoder_fixtures import loaded as loaded
from encoder_fixtures import moved as moved
from encoder_fixtures import small_models as small_models
from encoder_fixtures import whole as whole
from encoder_fixtures import written as written
