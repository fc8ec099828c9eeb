# Who hears when it gets expensive. A budget looks at billing data, which is hours behind, and stops nothing: what bounds the cost are
# the limits of the node pools, and the idle guard.

resource "aws_budgets_budget" "account" {
  name         = var.name
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = tostring(var.budget.monthly_usd)
  limit_unit   = "USD"

  # The whole account, not the tag: traffic, untagged leftovers and other people's clusters cost as much.
  dynamic "notification" {
    for_each = [{ type = "ACTUAL", percent = 50 }, { type = "ACTUAL", percent = 80 }, { type = "FORECASTED", percent = 100 }]

    content {
      notification_type          = notification.value.type
      comparison_operator        = "GREATER_THAN"
      threshold                  = notification.value.percent
      threshold_type             = "PERCENTAGE"
      subscriber_email_addresses = var.budget.emails
    }
  }
}

resource "aws_ce_cost_allocation_tag" "project" {
  count = var.activate_cost_tag ? 1 : 0

  tag_key = "project"
  status  = "Active"
}
