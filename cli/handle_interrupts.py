"""To import this is to do it: from then on Ctrl-C ends the process without a traceback.

A script imports it before the modules that take seconds, such as torch. No other module may.
"""

from cli.interrupts import exit_on_interrupt

exit_on_interrupt()
