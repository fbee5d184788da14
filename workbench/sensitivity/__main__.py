import sys

from workbench.sensitivity.frontier import main

sys.exit(main())
